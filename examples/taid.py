"""TAID, a method of your own with a schedule and state (Shing et al., ICLR 2025, https://arxiv.org/abs/2501.16937).

    L = KL(p_t‖q),   log p_t = log softmax((1−t) · log sg[q] + t · log p),   t from `start` to 1 over the run

The target moves from the student's own distribution to the teacher's. In a recipe: `method: {taid:TAID: {start: 0.4}}`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from understudy import Batch, Capability, ForwardKL, Method, Scores, Step


@dataclass
class TAID(Method):
    """Forward KL to a target that moves from the student to the teacher."""

    paper: ClassVar[str] = "Shing et al., ICLR 2025, https://arxiv.org/abs/2501.16937"

    start: float = 0.4

    def __post_init__(self) -> None:
        self.share = torch.tensor(self.start)  # t

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({Capability.FULL})

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        log_p, log_q = teacher.log_probs, student.log_probs  # (N, V); fine for small vocabularies
        target = ((1 - self.share) * log_q.detach() + self.share * log_p).log_softmax(-1)
        return ForwardKL()(target, log_q)

    def after_step(self, step: Step) -> None:
        self.share = torch.tensor(self.start + (1 - self.start) * step.number / max(step.total, 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"share": self.share}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.share = state["share"]
