"""Exposure bias: how much of a student's error comes from conditioning on its own prefixes (Arora et al., 2022).

    R(l) = Σ_{t≤l} E_{y_<t ~ q} KL(p(·|y_<t, x) ‖ q(·|y_<t, x))        on the student's own prefixes
    lε(l) = Σ_{t≤l} E_{y_<t ~ p} KL(p(·|y_<t, x) ‖ q(·|y_<t, x))       on the teacher's
    ExAccErr(l) = (R(l) − lε(l)) / lε(l) · 100 %

as in MiniLLM and PromptKD (https://arxiv.org/abs/2306.08543). The divergence is the forward KL, whatever the training
loss. Every response token counts, from the first (after the prompt alone, so that ExAccErr(1) = 0) to the
end-of-sequence token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Example
from ..teacher import Teacher
from .distance import compared, positions


@dataclass(frozen=True)
class ExposureBias:
    """Exposure bias by position, l = 1 … L, and what it is computed from; each (L,) in float64."""

    percent: Tensor  # ExAccErr(l); NaN where the teacher's side is 0
    standard_error: Tensor  # of `percent`, over prompts; NaN for a single prompt
    accumulated: Tensor  # R(l), nats
    expected: Tensor  # lε(l), nats
    alive: Tensor  # the student's samples that reach position l
    teacher_alive: Tensor  # the teacher's


def exposure_bias(
    model: Any,
    teacher: Teacher,
    student_samples: Sequence[Example],
    teacher_samples: Sequence[Example],
    vocabulary: int,
    batch_size: int = 32,
) -> ExposureBias:
    """ExAccErr from samples of student and teacher, drawn at temperature 1.

    Examples of the same `row` are samples for one prompt. At every position the KL is averaged over the prompt's
    samples that reach it (none: 0), summed up over positions, and averaged over prompts; the ratio is taken last. Its
    standard error is that of a ratio of means, to first order.

    Raises:
        ValueError: if the samples of the two are not for the same prompts.
    """
    rows = sorted({example.row for example in student_samples})
    if rows != sorted({example.row for example in teacher_samples}):
        raise ValueError("exposure bias needs samples of student and teacher for the same prompts")
    length = max(len(example.response) for example in [*student_samples, *teacher_samples])
    place = {row: index for index, row in enumerate(rows)}

    def curve(samples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(prompts, L) the mean KL summed up to each position, and (L,) the samples alive."""
        sums, alive = torch.zeros(2, len(rows), length, dtype=torch.float64)
        for batch, values in compared(model, teacher, samples, vocabulary, batch_size):
            prompt = torch.tensor([place[e.row] for e in batch.examples])[batch.sequence_ids.cpu()]
            where = (prompt, positions(batch).cpu())
            kl = values["forward_kl"].double().cpu()
            sums.index_put_(where, kl, accumulate=True)
            alive.index_put_(where, torch.ones_like(kl), accumulate=True)
        return (sums / alive.clamp(min=1)).cumsum(-1), alive.sum(0)

    accumulated, alive = curve(student_samples)
    expected, teacher_alive = curve(teacher_samples)
    R, E = accumulated.mean(0), expected.mean(0)
    residual = accumulated - R / E * expected
    return ExposureBias(
        percent=100 * (R - E) / E,
        standard_error=100 * residual.std(0, correction=1) / len(rows) ** 0.5 / E
        if len(rows) > 1
        else torch.full_like(E, torch.nan),
        accumulated=R,
        expected=E,
        alive=alive,
        teacher_alive=teacher_alive,
    )
