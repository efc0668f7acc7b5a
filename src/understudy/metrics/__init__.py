"""How good an answer is, given its references. One kind of judgement, one file; a metric is found by its number's name.

The numbers are out of 100, as papers print them.
"""

from collections.abc import Sequence

from ..metric import Metric, Score
from ..registry import Registry, UnknownName, nearest

FILES: Registry[Metric] = Registry("metric", __name__, Metric)


def names() -> list[str]:
    """Everything that can be measured."""
    return sorted(name for file in FILES.names() for name in FILES.get(file).names)


def check(wanted: Sequence[str]) -> None:
    """Refuse names of no metric.

    Raises:
        UnknownName: with the nearest name that there is.
    """
    for name in wanted:
        if name not in names():
            raise UnknownName(f'there is no metric "{name}"{nearest(name, names())}')


def compares_answers(name: str) -> bool:
    """Does this metric compare the answers to a prompt with each other, and not with references?"""
    return any(name in kind.names and kind.among_answers for kind in map(FILES.get, FILES.names()))


def score(wanted: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """The scores of the names `wanted`, in their order, for answers that each have at least one reference.

    Raises:
        UnknownName: for a name of no metric.
    """
    check(wanted)
    found: dict[str, Score] = {}
    for kind in map(FILES.get, FILES.names()):
        if set(wanted) & set(kind.names):
            found |= kind().score(answers, references)
    return {name: found[name] for name in wanted}
