"""The student as its own teacher: self-distillation with privileged context, and context distillation.

The teacher has the student's weights and reads another prompt (`data.teacher_prompt`): the solution, a hint, documents,
a system prompt. What it knows with them the student learns to know without.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..models.forward import score_constant
from ..models.parity import can_fuse_after_forward
from ..models.saved import shared_copy
from ..models.sharding import is_shard
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher

Weights = Literal["start", "average", "current", "base"]


class StudentTeacher(Teacher):
    """Scores with the student's own weights: those it started with, an exponential moving average, or the current ones.

    On-policy it is the self-distillation of OPSD (arXiv 2601.18734, weights of the start) and SDFT (arXiv 2601.19897,
    the average). It takes no second model: frozen weights are shared with the student, and only those that are trained
    are copied for `start` and `average`.

    Args:
        weights: `start`, as they were before the first step; `average`, φ ← decay · φ + (1 − decay) · θ after each
            step; `current`, the student's, without gradients; `base`, the student with its adapters switched off.
        decay: of the average.
    """

    provides: ClassVar[frozenset[Capability]] = frozenset(Capability)

    def __init__(self, *, weights: Weights = "start", decay: float = 0.99) -> None:
        if weights not in get_args(Weights):
            raise ValueError(f"weights is {weights!r}, and can be {', '.join(get_args(Weights))}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, and must be at least 0 and below 1")
        self.weights, self.decay = weights, decay
        self._student: Any = None

    @property
    def needs_student(self) -> bool:
        return True

    @property
    def follows_student(self) -> bool:
        return self.weights in ("average", "current")

    def set_student(self, student: nn.Module) -> None:
        model = shared_copy(student)
        if self.weights == "base":
            if not hasattr(model, "peft_config"):
                raise ValueError("weights: base is the student without its adapters, and it has none: use start")
            model = model.unload()
        self._student, self.model = student, model.eval()
        if self.weights in ("start", "average"):
            for _, own, trained in self._pairs():
                own.data = trained.detach().clone()

    @property
    def local_model(self) -> None:
        """None: a run records the student's weights already."""
        return None

    @cached_property
    def fused(self) -> bool:
        """Can the loss use its head?"""
        return can_fuse_after_forward(self.model)

    def score(self, batch: Batch) -> Scores:
        return score_constant(self.model, batch.as_read_by_teacher().to(self.model.device), self.fused)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """See `Teacher`.

        Raises:
            ValueError: if the student's weights have been sharded or moved since, so that they cannot be followed.
        """
        for _, own, trained in self._pairs() if self.follows_student else ():
            if is_shard(trained) or (self.weights == "current" and own.data_ptr() != trained.data_ptr()):
                raise ValueError(
                    f"weights: {self.weights} follows the student's whole weights, and FSDP2 and DeepSpeed shard or "
                    "move them: use weights: start, or DDP"
                )
            if self.weights == "average":
                own.lerp_(trained.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: own.detach().clone() for name, own, _ in self._pairs()} if self.weights == "average" else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, own, _ in self._pairs() if self.weights == "average" else ():
            own.copy_(state[name])

    def _pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """The parameters that are trained: name, the teacher's own, the student's."""
        own = dict(self.model.named_parameters())
        return [(name, own[name], p) for name, p in self._student.named_parameters() if p.requires_grad]
