"""Judging a model by its answers: how many are right, how good they are, and how far they are from a teacher's.

Every answer is written with a given sampling protocol and seed. An answer is right if it matches a reference exactly
(after normalisation), or, where every reference has a final answer behind `####`, if it ends in that. The distance to
a teacher is measured where it matters, on the model's own answers.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .. import metrics as judges
from ..batch import Author, Example
from ..data.examples import Examples
from ..data.formats import Row
from ..metrics.exact_match import exact_match
from ..metrics.final_answer import final_answer, is_correct
from ..rollout import Rollout
from ..sampling import Sampling
from ..scores import DIVERGENCE_METRICS
from ..teacher import Capability, Teacher
from .distance import distances
from .exposure_bias import exposure_bias
from .responses import Answer, Pace, Written, write_answers

Curve = Mapping[str, Sequence[float | None]]  # a number's name: its values at the first position, the second, …


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, and what that comes to."""

    answers: list[dict[str, Any]]  # seed, row, prompt, answer, references, correct, truncated, tokens, id
    metrics: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)  # how the metrics that were asked for were come by
    curves: dict[str, Curve] = field(default_factory=dict)  # numbers by position in an answer


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    rollout: Rollout,
    sampling: Sampling,
    teacher: Teacher | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    metrics: Sequence[str] = (),
    *,
    exposure: bool = False,
    output: Path | None = None,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Let `model` answer every example's prompt by `rollout`, and measure.

    Metrics: `accuracy` (share of right answers, where there are references), `examples`, `response_length` (tokens),
    `truncated` (share of answers without an end), `seconds` and `tokens_per_second` of what was written now; with a
    teacher the means over the tokens of the model's own answers of `forward_kl`, `reverse_kl`, `student_entropy` and
    `teacher_entropy` in nats, `agreement` and `top_10_overlap` (`distance.differences`), and `teacher_perplexity`. With
    several seeds a number is the mean of the seeds', and `<name>_std` their standard deviation.

    Args:
        seed: of sampling; every one of several gives an answer to every prompt.
        batch_size: sequences that model and teacher read at once when they are compared.
        metrics: further ones of the folder metrics/, out of 100, over the rows that have references.
        exposure: let the teacher answer the prompts, too, and measure `exposure_bias` (percent, over whole answers).
        output: the JSONL file that keeps the answers, from which an interrupted evaluation goes on; the teacher's are
            beside it.
        at_once: answers written at once in the beginning; more as long as that is faster (`writing.Pace`). Without it
            the rollout's own batch size stays.
        progress: where to show how far it has got.

    Raises:
        ValueError: before anything is written, for a name of no metric, for metrics whose references are missing, for
            seeds that would all give the same answers, and for exposure bias without what it needs.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    _check(examples, sampling, teacher, seeds, metrics, exposure)
    by_end = all(final_answer(r) is not None for row in examples.rows for r in row.references)

    def judge(text: str, row: Row) -> bool | None:
        return (is_correct if by_end else exact_match)(text, row.references) if row.references else None

    def task(what: str) -> Callable[[int], None]:
        return _task(progress, what, len(seeds) * len(examples))

    def write(author: Author, by: Any, path: Path | None) -> Written:
        options: dict[str, Any] = {"author": author, "path": path, "made": task(f"{author}'s answers")}
        pace = None if at_once is None else Pace(at_once)
        return write_answers(by, tokenizer, examples, rollout, sampling, seeds, judge, pace=pace, **options)

    written = write("student", model, output)
    rounds = [written.answers[start : start + len(examples)] for start in range(0, len(written.answers), len(examples))]
    measured = _over_seeds([_counts(answers) for answers in rounds]) | {"seconds": written.seconds}
    if written.tokens:
        measured["tokens_per_second"] = written.tokens / written.seconds
    numbers, signatures = _judged(metrics, rounds)
    measured |= numbers
    curves: dict[str, Curve] = {}
    if teacher is not None:
        far = [[answer.example for answer in answers] for answers in rounds]
        made = task("distance to the teacher")
        found = [distances(model, teacher, own, len(tokenizer), batch_size, made) for own in far]
        measured |= _over_seeds([_readable(of_seed.means()) for of_seed in found])
        curves["distance"] = sum(found[1:], found[0]).by_position()
    if exposure:
        live: Any = teacher
        beside = None if output is None else output.with_name(f"{output.stem}.teacher{output.suffix}")
        theirs = write("teacher", live.model, beside)
        own, others = ([answer.example for answer in each.answers] for each in (written, theirs))
        bias = exposure_bias(model, live, own, others, len(tokenizer), batch_size)
        measured["exposure_bias"] = float(bias.percent[-1])
        curves["exposure_bias"] = {name: _finite(values.tolist()) for name, values in vars(bias).items()}
    return Evaluation([answer.line for answer in written.answers], measured, signatures, curves)


def distance(
    model: Any, teacher: Teacher, examples: Sequence[Example], vocabulary: int, batch_size: int = 32
) -> dict[str, float]:
    """The means over all response tokens of what `scores.compare` says of model and teacher."""
    means = distances(model, teacher, examples, vocabulary, batch_size).means()
    return {name: means[name] for name in DIVERGENCE_METRICS}


def _check(
    examples: Examples,
    sampling: Sampling,
    teacher: Teacher | None,
    seeds: Sequence[int],
    metrics: Sequence[str],
    exposure: bool,
) -> None:
    """Refuse what would turn out to be impossible, or to mean nothing, when every answer is written."""
    judges.check(metrics)
    among = [name for name in metrics if judges.compares_responses(name)]
    plain = [name for name in metrics if name not in among]
    if plain and not any(row.references for row in examples.rows):
        raise ValueError(
            f"no row of {examples.source} has a reference for {' and '.join(plain)}: name the column that holds them, "
            "such as completion=de"
        )
    if among and len(seeds) < 2:
        raise ValueError(f"{among[0]} compares the answers to a prompt with each other: give several seeds")
    if len(set(seeds)) < len(seeds):
        raise ValueError("two of the seeds are the same: give every one once")
    if len(seeds) > 1 and sampling.temperature == 0:
        raise ValueError("greedy answers do not depend on the seed: give one seed, or a temperature above 0")
    if exposure and (teacher is None or not teacher.can(Capability.MODEL)):
        raise ValueError("exposure bias needs a teacher that can write: give a local one")
    if exposure and (sampling.temperature, sampling.top_k, sampling.top_p) != (1, 0, 1):
        raise ValueError(
            "exposure bias is about the models' own distributions: sample at temperature 1, without top-k or top-p"
        )


def _counts(answers: Sequence[Answer]) -> dict[str, float]:
    judged = [answer.line["correct"] for answer in answers if answer.line["correct"] is not None]
    return {
        **({"accuracy": sum(judged) / len(judged)} if judged else {}),
        "examples": float(len(answers)),
        "response_length": sum(len(answer.example.response) for answer in answers) / len(answers),
        "truncated": sum(answer.example.truncated for answer in answers) / len(answers),
    }


def _judged(metrics: Sequence[str], rounds: Sequence[Sequence[Answer]]) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers of metrics/ for the answers of every seed, and their signatures."""
    among = [name for name in metrics if judges.compares_responses(name)]
    plain = [name for name in metrics if name not in among]
    scores = []
    for answers in rounds:
        lines = [answer.line for answer in answers if answer.line["references"]]
        scores.append(judges.score(plain, [line["answer"] for line in lines], [line["references"] for line in lines]))
    prompts = [[answer.line["answer"] for answer in prompt] for prompt in zip(*rounds, strict=True)]
    others = [texts[:i] + texts[i + 1 :] for texts in prompts for i in range(len(texts))]
    together = judges.score(among, [text for texts in prompts for text in texts], others)
    numbers = _over_seeds([{name: score.value for name, score in of_seed.items()} for of_seed in scores])
    numbers |= {name: score.value for name, score in together.items()}
    return numbers, {name: score.signature for name, score in (scores[0] | together).items()}


def _over_seeds(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """One seed's numbers as they are; of several the means and, as `<name>_std`, the sample standard deviations."""
    if len(each) == 1:
        return each[0]
    found = {}
    for name in each[0]:
        values = [numbers[name] for numbers in each]
        found[name] = statistics.fmean(values)
        if name != "examples":
            found[f"{name}_std"] = statistics.stdev(values)
    return found


def _readable(means: dict[str, float]) -> dict[str, float]:
    """With the teacher's surprise as people know it: its perplexity, the exponential of the mean over all tokens."""
    surprise = means.pop("teacher_surprise", None)
    return means if surprise is None else {**means, "teacher_perplexity": math.exp(surprise)}


def _task(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """Show a task; returns what is to be told how many more of `total` are done."""
    if progress is None:
        return lambda count: None
    shown = progress.add_task(what, total=total)
    return lambda count: progress.advance(shown, count)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
