"""Generalized Knowledge Distillation (Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649).

    L = (1−λ) E_{(x,y)~data} [D(p‖q)(y|x)] + λ E_{x~data, y~sg[q](·|x)} [D(p‖q)(y|x)]          (Algorithm 1)
    D(p‖q)(y|x) = 1/|y| Σ_t D(p(·|y_<t, x) ‖ q(·|y_<t, x))                                      (Eq. 2)

The student learns on its own responses, where its mistakes are. Sampling is not differentiated: the responses are ids.
Prerequisite (the paper's, too): a student that already writes sensible text, so warm it up with `sft` first.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import Divergence, JensenShannon
from ..method import Method
from ..rollout import Writers
from ..scores import Scores
from ..step import Step


@dataclass
class GKD(Method):
    """On-policy distillation with any divergence; λ = 0 is supervised KD."""

    paper: ClassVar[str] = "Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649"

    on_policy: float = 1.0  # λ, the share of training on the student's own responses
    mix: Literal["step", "example"] = "step"  # is λ's coin thrown for a whole step (the paper) or for each example?
    divergence: Divergence = field(default_factory=JensenShannon)
    reduction: Reduction = "sequence"

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"gkd needs on_policy between 0 and 1, not {self.on_policy}")
        if self.mix not in ("step", "example"):
            raise ValueError(f"gkd needs a mix of step or example, not {self.mix!r}")

    @property
    def authors(self) -> frozenset[Author]:
        wanted: dict[Author, bool] = {"dataset": self.on_policy < 1, "student": self.on_policy > 0}
        return frozenset(author for author, is_wanted in wanted.items() if is_wanted)

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        def own(example: Example) -> bool:
            names = ("on_policy",) if self.mix == "step" else ("on_policy", example.row)
            return step.uniform(*names) < self.on_policy

        kept = [e for e in examples if not own(e)]
        asked = [e for e in examples if own(e)]
        # Under a sharded student all processes write together: one that has nothing to ask must not stay away.
        writes = asked or (self.mix == "example" and self.on_policy > 0)
        return kept + (writers.student.generate(asked, step) if writes else [])

    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        return self.divergence.between(teacher, student)
