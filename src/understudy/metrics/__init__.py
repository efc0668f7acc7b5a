"""Metrics of responses against references: BLEU, chrF, ROUGE, exact match, final answer, self-BLEU.

A metric is selected by the name of one of its numbers (`rouge_l`), or as `my_module:MyMetric`, which selects all
numbers of that class. There is one file per kind of metric. All numbers are out of 100, as in papers.
"""

from collections.abc import Sequence

from ..metric import Metric, Score
from ..registry import Registry, UnknownName, nearest

METRICS: Registry[Metric] = Registry("metric", __name__, Metric)


def names() -> list[str]:
    """The names of all numbers that the metrics of this package and of entry points compute."""
    return sorted(number for name in METRICS.names() for number in METRICS.get(name).names)


def check(metrics: Sequence[str]) -> None:
    """Check that there are such metrics.

    Raises:
        UnknownName: for an unknown name, with the nearest one; and for two metrics with a number of the same name.
    """
    numbers(metrics)


def compares_responses(metric: str) -> bool:
    """Does this metric compare the responses to a prompt with each other, instead of with references?"""
    return _class_of(metric).compares_responses


def numbers(metrics: Sequence[str]) -> dict[str, type[Metric]]:
    """The names of the numbers of these metrics, in order, each with the class that computes it.

    Raises:
        UnknownName: as `check`.
    """
    classes: dict[str, type[Metric]] = {}
    for metric in metrics:
        cls = _class_of(metric)
        for name in cls.names if ":" in metric else (metric,):
            if classes.setdefault(name, cls) is not cls:
                raise UnknownName(f'the metric {metric} has a number "{name}", and so has another one: rename one')
    return classes


def score(metrics: Sequence[str], responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """The scores of the responses, each of which has at least one reference, by the names of the numbers.

    Raises:
        UnknownName: as `check`.
        ValueError: for a class that returns no score for one of its names.
    """
    classes = numbers(metrics)
    scores = {cls: cls().score(responses, references) for cls in dict.fromkeys(classes.values())}
    for name, cls in classes.items():
        if name not in scores[cls]:
            raise ValueError(f'the metric {cls.__name__} returned no score "{name}", which is one of its names')
    return {name: scores[cls][name] for name, cls in classes.items()}


def _class_of(metric: str) -> type[Metric]:
    if ":" in metric:
        cls = METRICS.get(metric)
        numbers = getattr(cls, "names", ())
        if not numbers or isinstance(numbers, str):
            raise UnknownName(f'the metric {metric} has no names: add a class variable such as names = ("mine",)')
        return cls
    builtin = METRICS.builtin_names()
    for name in [*builtin, *(name for name in METRICS.names() if name not in builtin)]:
        if metric in METRICS.get(name).names:
            return METRICS.get(name)
    raise UnknownName(f'there is no metric "{metric}"{nearest(metric, names())}')
