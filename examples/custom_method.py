"""A method of one's own: a dataclass with a loss, here TAID with a fixed schedule (https://arxiv.org/abs/2501.16937).

    L = KL(p_t‖q),   log p_t = log softmax((1−t) · log sg[q] + t · log p),   t from `start` to 1 over the run

The student first imitates something near itself and then, more and more, the teacher.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from understudy.batch import Batch, Reduction
from understudy.divergences import ForwardKL
from understudy.method import Method
from understudy.scores import Scores
from understudy.step import Step


@dataclass
class Interpolated(Method):
    """Forward KL to a target that moves from the student to the teacher."""

    paper: ClassVar[str] = "Shing et al., ICLR 2025, https://arxiv.org/abs/2501.16937"

    start: float = 0.4
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        self.share = torch.tensor(self.start)  # t

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        log_q, log_p = student.log_probs, teacher.log_probs  # (N, V); fine for small vocabularies
        target = ((1 - self.share) * log_q.detach() + self.share * log_p).log_softmax(-1)
        return ForwardKL()(target, log_q)

    def after_step(self, step: Step) -> None:
        self.share = torch.tensor(self.start + (1 - self.start) * step.number / max(step.total, 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"share": self.share}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.share = state["share"]
