"""Judging a model by its answers: how many are right, and how far they are from a teacher.

Every answer is written with a given sampling protocol and seed. An answer is right if it matches a reference exactly
(after normalisation), or, where every reference has a final answer behind `####`, if it ends in that. The distance to
a teacher is measured where it matters, on the model's own answers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import metrics as judges
from .batch import Batch, Example
from .data import Examples
from .metrics.exact_match import exact_match
from .metrics.final_answer import final_answer, is_correct
from .rollout import Rollout
from .scores import Scores, can_project, compare, score
from .step import Step
from .teacher import Teacher


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, and what that comes to."""

    answers: list[dict[str, Any]]  # prompt, answer, references, correct
    metrics: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)  # how the metrics that were asked for were come by


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    rollout: Rollout,
    teacher: Teacher | None = None,
    seed: int = 0,
    batch_size: int = 32,
    metrics: Sequence[str] = (),
) -> Evaluation:
    """Let `model` answer every example's prompt by `rollout`, and measure.

    Metrics: `accuracy` (share of right answers, where there are references), `response_length` (tokens), `truncated`
    (share of answers without an end), `seconds` of writing; with a teacher also `forward_kl`, `reverse_kl`,
    `student_entropy` and `teacher_entropy`, means over the tokens of the model's own answers in nats. `metrics` names
    further ones of the folder metrics/, out of 100, over the rows that have references.

    Raises:
        ValueError: before anything is written, for a name of no metric, and for metrics of rows without references.
    """
    judges.check(metrics)
    if metrics and not any(row.references for row in examples.rows):
        raise ValueError(
            f"{', '.join(metrics)} compare with references, and no row of {examples.source} has one: name the column "
            "that holds them, such as completion=de"
        )
    start = time.perf_counter()
    written = rollout.follow(model, tokenizer).generate(examples.examples, Step(0, seed))
    seconds = time.perf_counter() - start
    by_end = all(final_answer(r) is not None for row in examples.rows for r in row.references)
    answers = []
    for example, answer in zip(examples.rows, written, strict=True):
        text = tokenizer.decode(answer.response, skip_special_tokens=True)
        right = (is_correct if by_end else exact_match)(text, example.references) if example.references else None
        answers.append(
            {"prompt": example.prompt, "answer": text, "references": list(example.references), "correct": right}
        )
    measured = {
        "examples": float(len(answers)),
        "response_length": sum(len(e.response) for e in written) / len(written),
        "truncated": sum(e.truncated for e in written) / len(written),
        "seconds": seconds,
    }
    judged = [a["correct"] for a in answers if a["correct"] is not None]
    if judged:
        measured = {"accuracy": sum(judged) / len(judged), **measured}
    scored = [a for a in answers if a["references"]]
    scores = judges.score(metrics, [a["answer"] for a in scored], [a["references"] for a in scored])
    measured |= {name: score.value for name, score in scores.items()}
    if teacher is not None:
        measured |= distance(model, teacher, written, len(tokenizer), batch_size)
    return Evaluation(answers, measured, {name: score.signature for name, score in scores.items()})


@torch.no_grad()
def distance(
    model: Any, teacher: Teacher, examples: Sequence[Example], vocabulary: int, batch_size: int = 32
) -> dict[str, float]:
    """The means over all response tokens of what `scores.compare` says of model and teacher."""
    sums: dict[str, float] = {}
    tokens = 0
    model.eval()
    projects = can_project(model)
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        batch = Batch.of(ordered[start : start + batch_size], 0, model.get_input_embeddings().weight.device)
        taught = teacher.score(batch)

        def look(student: Scores, taught: Scores = taught) -> torch.Tensor:
            for name, values in compare(taught, student).items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            return student.tokens.float()

        score(model, batch, look, vocabulary=vocabulary, project=projects)
        tokens += len(batch.tokens)
    return {name: total / tokens for name, total in sums.items()}
