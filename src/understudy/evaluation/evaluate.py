"""Evaluate a model: generate responses to prompts, measure accuracy, text metrics and the distance to a teacher.

Every response has given sampling parameters and a seed. A response is correct if it agrees with a reference: in the
final answer where the reference has one after `####` or in a box, else as a whole (`final_answer.agree`). The distance
to a teacher is measured on the model's own responses. The metrics are

    accuracy                        share of correct responses, where there are references
    examples                        the number of prompts
    response_length, truncated      tokens; share of responses without an end
    seconds, tokens_per_second      of the responses generated in this call, not of those resumed from a file
    forward_kl, reverse_kl, student_entropy, teacher_entropy, agreement, top_10_overlap, teacher_perplexity
                                    with a teacher: means over tokens, in nats or shares (`distance.differences`)
    exposure_bias                   percent, over whole responses

With several seeds a number is the mean over seeds, and `<name>_std` their standard deviation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .. import metrics as text_metrics
from ..batch import Author, Example
from ..data.examples import Examples
from ..data.formats import Row
from ..metrics.final_answer import agree
from ..models.vocabulary import vocabulary_size
from ..rollout import Rollout
from ..sampling import Sampling
from ..scores import DIVERGENCE_METRICS, SHARED_BOUNDARIES
from ..teacher import Capability, Teacher
from . import exposure_bias as bias
from .distance import distances
from .response_metrics import buckets, over_seeds, response_metrics
from .responses import BatchSizeSearch, Responses, check_resumable, generate_responses

Curve = Mapping[str, Sequence[float | None]]  # a number's name: its values at the first position, the second, …


@dataclass(frozen=True)
class Evaluation:
    """A model's responses and their metrics."""

    responses: list[dict[str, Any]]  # seed, row, prompt, response, references, correct, truncated, tokens, id
    metrics: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)  # how the text metrics were computed
    curves: dict[str, Curve] = field(default_factory=dict)  # numbers by position in a response
    scores: dict[str, list[float]] = field(default_factory=dict)  # by metric the number of each prompt


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
    length_buckets: Sequence[int] = (),
    exposure_bias: bool = False,
    output: Path | None = None,
    first_batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate `model`: generate a response to every example's prompt by `rollout`, and compute the metrics.

    Args:
        seed: of sampling; every prompt gets one response for each seed.
        batch_size: sequences scored at once by model and teacher, for their distance.
        metrics: further ones of the folder metrics/, out of 100, over the rows that have references.
        length_buckets: bounds of the references' lengths in tokens, by which the metrics are also computed.
        exposure_bias: generate responses of the teacher as well, and measure `exposure_bias`.
        output: a JSONL file of responses, from which an interrupted evaluation is resumed; the teacher's go beside it.
        first_batch_size: where `responses.BatchSizeSearch` begins; by default the rollout's own batch size stays.

    Raises:
        ValueError: before anything is generated, as `check`.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    check(examples, sampling, teacher, seeds, metrics, length_buckets, exposure_bias)

    def generate(author: Author, generator: Any, path: Path | None) -> Responses:
        search = first_batch_size and BatchSizeSearch(first_batch_size)
        on_progress = _task(progress, f"{author}'s responses", len(seeds) * len(examples))
        options: dict[str, Any] = {"author": author, "path": path, "search": search, "on_progress": on_progress}
        return generate_responses(generator, tokenizer, examples, rollout, sampling, seeds, _is_correct, **options)

    live_teacher: Any = teacher
    path = output and output.with_name(f"{output.stem}.teacher{output.suffix}")
    if exposure_bias and path is not None:  # before the student's responses are generated
        check_resumable(live_teacher.model, tokenizer, examples, rollout, sampling, seeds, "teacher", path)
    generated = generate("student", model, output)
    measured = response_metrics(generated, len(examples), metrics, length_buckets, tokenizer)
    numbers, curves = measured.numbers, dict[str, Curve]()
    samples, vocabulary = [r.example for r in generated.responses], vocabulary_size(tokenizer)
    if teacher is not None:
        on_progress = _task(progress, "distance to the teacher", len(samples))
        parts = [[response.example for response in part] for part in generated.by_seed(len(examples))]
        by_seed = [distances(model, teacher, part, vocabulary, batch_size, on_progress) for part in parts]
        numbers |= over_seeds([_with_perplexity(part.means()) for part in by_seed])
        curves["distance"] = sum(by_seed[1:], by_seed[0]).by_position()
    if exposure_bias:
        samples_of_teacher = [r.example for r in generate("teacher", live_teacher.model, path).responses]
        exposure = bias.exposure_bias(model, live_teacher, samples, samples_of_teacher, vocabulary, batch_size)
        numbers["exposure_bias"] = float(exposure.percent[-1])
        curves["exposure_bias"] = {name: _finite(values.tolist()) for name, values in vars(exposure).items()}
    return Evaluation([r.line for r in generated.responses], numbers, measured.signatures, curves, measured.scores)


def distance(
    model: Any, teacher: Teacher, examples: Sequence[Example], vocabulary: int, batch_size: int = 32
) -> dict[str, float]:
    """The means of `scores.divergence_metrics` of model and teacher over all response tokens."""
    means = distances(model, teacher, examples, vocabulary, batch_size).means()
    return {name: means[name] for name in (*DIVERGENCE_METRICS, SHARED_BOUNDARIES) if name in means}


def check(
    examples: Examples,
    sampling: Sampling,
    teacher: Teacher | None,
    seeds: Sequence[int],
    metrics: Sequence[str],
    length_buckets: Sequence[int],
    exposure_bias: bool,
) -> None:
    """Refuse settings that would fail or be meaningless, before any response is generated.

    Raises:
        ValueError: for an unknown metric, for metrics whose references are missing, for lengths that do not rise, for
            seeds that would all give the same responses, and for exposure bias without a local teacher or not at T = 1.
    """
    text_metrics.check(metrics)
    buckets(length_buckets)
    diversity = [name for name in metrics if text_metrics.compares_responses(name)]
    quality = [name for name in metrics if name not in diversity]
    if quality and not any(row.references for row in examples.rows):
        raise ValueError(
            f"no row of {examples.source} has a reference for {' and '.join(quality)}: name the column that holds "
            "them, such as completion=de"
        )
    if diversity and len(seeds) < 2:
        raise ValueError(f"{diversity[0]} compares the responses to a prompt with each other: give several seeds")
    if len(set(seeds)) < len(seeds):
        raise ValueError("two of the seeds are the same: give every one once")
    if len(seeds) > 1 and sampling.temperature == 0:
        raise ValueError("greedy responses do not depend on the seed: give one seed, or a temperature above 0")
    if exposure_bias and (teacher is None or not teacher.can(Capability.MODEL)):
        raise ValueError("exposure bias needs a teacher that can generate: give a local one")
    if exposure_bias and (sampling.temperature, sampling.top_k, sampling.top_p) != (1, 0, 1):
        raise ValueError(
            "exposure bias is about the models' own distributions: sample at temperature 1, without top-k or top-p"
        )


def _is_correct(text: str, row: Row) -> bool | None:
    return any(agree(text, reference) for reference in row.references) if row.references else None


def _with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """With the teacher's perplexity, the exponential of its mean surprise, in place of the surprise."""
    surprise = means.pop("teacher_surprise", None)
    return means if surprise is None else {**means, "teacher_perplexity": math.exp(surprise)}


def _task(progress: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """Show a task of `total` steps; returns a function that is called with the number of further steps."""
    if progress is None:
        return lambda count: None
    task = progress.add_task(description, total=total)
    return lambda count: progress.advance(task, count)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
