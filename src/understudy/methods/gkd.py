"""Generalized Knowledge Distillation (Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649).

    L = (1−λ) E_{(x,y)~data} [D(p‖q)(y|x)] + λ E_{x~data, y~sg[q](·|x)} [D(p‖q)(y|x)]          (Algorithm 1)
    D(p‖q)(y|x) = 1/|y| Σ_t D(p(·|y_<t, x) ‖ q(·|y_<t, x))                                      (Eq. 2)

With a reward r the same samples serve reinforcement learning as well (Eq. 5): maximise

    E_x [ (1−α) E_{y~q}[r(x, y)] − α E_{y~sg[q]}[D(p‖q)(y|x)] ]

by −(1−α) (r − r̄) Σ_t log q(y_t) + α D per response: the reward is differentiated through the policy (score function, r̄
the mean reward of the other responses to the prompt), the divergence is not differentiated through sampling.

The student learns on its own responses, where its mistakes are. Sampling is not differentiated: the responses are ids.
Prerequisite (the paper's, too): a student that already writes sensible text, so warm it up with `sft` first.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import Divergence, JensenShannon
from ..method import Method
from ..reward import Reward
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
    distillation: float = 1.0  # α, of the divergence; 1 − α is the reward's
    reward: Reward | None = None  # of the student's responses

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"gkd needs on_policy between 0 and 1, not {self.on_policy}")
        if self.mix not in ("step", "example"):
            raise ValueError(f"gkd needs a mix of step or example, not {self.mix!r}")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"gkd needs distillation between 0 and 1, not {self.distillation}")
        if self.distillation < 1 and self.reward is None:
            raise ValueError("gkd with distillation below 1 leaves the rest to a reward: give one")
        if self.reward is not None and (self.on_policy < 1 or self.reduction != "sequence"):
            raise ValueError("gkd's reward is of the student's own responses: it needs on_policy 1, reduction sequence")

    @property
    def authors(self) -> frozenset[Author]:
        wanted: dict[Author, bool] = {"dataset": self.on_policy < 1, "student": self.on_policy > 0}
        return frozenset(author for author, is_wanted in wanted.items() if is_wanted)

    @property
    def watched(self) -> tuple[str, ...]:
        return () if self.reward is None else self.reward.names

    def prepare(self, teacher: Any, tokenizer: Any, learning_rate: float) -> Any:
        self._tokenizer = tokenizer
        return teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        def own(example: Example) -> bool:
            names = ("on_policy",) if self.mix == "step" else ("on_policy", example.row)
            return step.uniform(*names) < self.on_policy

        kept = [e for e in examples if not own(e)]
        asked = [e for e in examples if own(e)]
        # Under a sharded student all processes write together: one that has nothing to ask must not stay away.
        writes = asked or (self.mix == "example" and self.on_policy > 0)
        written = writers.student(asked, step) if writes else []
        return kept + (written if self.reward is None else self.reward.judge(written, self._tokenizer))

    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        value = self.divergence.between(teacher, student)
        if self.distillation == 1:
            return value
        return self.distillation * value + (1 - self.distillation) * self._policy_loss(student, batch)

    @staticmethod
    def _policy_loss(student: Scores, batch: Batch) -> Tensor:
        """(N,) −|y| (r − r̄) log q(y_t), whose means over tokens are −(r − r̄) log q(y)."""
        advantage = torch.tensor([e.advantage for e in batch.examples], device=batch.owner.device)
        factor = (advantage * batch.lengths)[batch.owner]
        weights = None if student.weights is None else student.weights * factor
        return -factor * replace(student, weights=weights).chosen

    def observe(self, student: Scores, teacher: Scores, batch: Batch) -> dict[str, Tensor]:
        return {name: torch.tensor([e.rewards[name] for e in batch.examples]) for name in self.watched}
