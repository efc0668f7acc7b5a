"""Supervised, word-level knowledge distillation (Hinton et al., 2015; Sanh et al., 2019; the "KD" of MiniLLM and GKD).

    L = E_{(x,y)~data} [ (1−ρ) D(p‖q)(y|x) − ρ log q(y|x) ]

The student is trained on the teacher's full distribution, but only on prefixes from the dataset, never on its own.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..batch import Batch, Reduction
from ..divergences import Divergence, ForwardKL
from ..method import Method, for_divergence
from ..scores import Scores
from ..teacher import Capability


@dataclass
class KD(Method):
    """Word-level distillation on the dataset; `sft_weight` mixes in its labels (0.5 in the scripts of MiniLLM)."""

    paper: ClassVar[str] = "Hinton et al., 2015, https://arxiv.org/abs/1503.02531"

    divergence: Divergence = field(default_factory=ForwardKL)
    sft_weight: float = 0.0  # ρ
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.sft_weight < 1:
            raise ValueError(
                f"kd needs sft_weight in [0, 1), not {self.sft_weight}; for labels alone use the method sft"
            )

    @property
    def requires(self) -> frozenset[Capability]:
        return for_divergence(self.divergence)

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        loss = teacher.divergence_to(student, self.divergence)
        return (1 - self.sft_weight) * loss - self.sft_weight * student.chosen if self.sft_weight else loss
