"""Generalized Knowledge Distillation (Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649).

    L = (1−λ) E_{(x,y)~data} [D(p‖q)(y|x)] + λ E_{x~data, y~sg[q](·|x)} [D(p‖q)(y|x)]          (Algorithm 1)
    D(p‖q)(y|x) = 1/|y| Σ_t D(p(·|y_<t, x) ‖ q(·|y_<t, x))                                      (Eq. 2)

With a reward r the same samples serve reinforcement learning as well (Eq. 5): maximise

    E_x [ (1−α) E_{y~q}[r(x, y)] − α E_{y~sg[q]}[D(p‖q)(y|x)] ]

by −(1−α) (r − r̄) Σ_t log q(y_t) + α D per response: the reward is differentiated through the policy (score function, r̄
the mean reward of the other responses to the prompt), the divergence is not differentiated through sampling.

The student is trained on its own responses, which contain its own mistakes. Sampling is not differentiated. As in the
paper the student must be able to generate sensible text: warm it up with `sft` first.
"""

from copy import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import Divergence, JensenShannon
from ..method import EvaluatedPart, Method, MethodContext, for_divergence
from ..reward import Reward
from ..rollout import Writers
from ..sampling import Sampling
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher


@dataclass
class GKD(Method):
    """On-policy distillation with any divergence; λ = 0 is supervised KD."""

    paper: ClassVar[str] = "Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649"
    collects_ahead: ClassVar[bool] = True

    on_policy: float = 1.0  # λ, the share of training on the student's own responses
    mix: Literal["step", "example"] = "step"  # on-policy with probability λ: a whole step (the paper) or each example
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
            raise ValueError("gkd with distillation below 1 needs a reward for the rest: give one")
        if self.reward is not None and (self.on_policy < 1 or self.reduction != "sequence"):
            raise ValueError("gkd's reward is of the student's own responses: it needs on_policy 1, reduction sequence")
        if self.distillation == 1 and self.reward is not None:
            raise ValueError(
                "gkd's reward has no weight at distillation 1: lower distillation, or leave the reward out"
            )

    @property
    def authors(self) -> frozenset[Author]:
        uses: dict[Author, bool] = {"dataset": self.on_policy < 1, "student": self.on_policy > 0}
        return frozenset(author for author, is_used in uses.items() if is_used)

    @property
    def requires(self) -> frozenset[Capability]:
        return for_divergence(self.divergence)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.n > 1 and self.mix == "example" and 0 < self.on_policy < 1:
            raise ValueError(
                f"gkd with mix example would count a student's prompt {sampling.n} times and a dataset's once: set the "
                "rollout's n to 1, or mix to step"
            )

    def setup(self, context: MethodContext) -> Teacher | None:
        self._tokenizer = context.tokenizer
        return context.teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        def is_on_policy(example: Example) -> bool:
            names = ("on_policy",) if self.mix == "step" else ("on_policy", example.row)
            return step.uniform(*names) < self.on_policy

        fixed = [e for e in examples if not is_on_policy(e)]
        prompts = [e for e in examples if is_on_policy(e)]
        # With a sharded student all processes generate together, including one without prompts at this step.
        generates = prompts or (self.mix == "example" and self.on_policy > 0)
        responses = writers.student(prompts, step) if generates else []
        if self.reward is not None:
            groups = [index // writers.student.sampling.n for index in range(len(responses))]
            responses = self.reward.score(responses, self._tokenizer, groups)
        return fixed + responses

    def evaluated_parts(self) -> list[EvaluatedPart]:
        """The student's own responses and the dataset's apart; the loss is their mean in the shares λ and 1 − λ."""
        student, dataset = copy(self), copy(self)
        student.on_policy, dataset.on_policy = 1.0, 0.0
        dataset.distillation, dataset.reward = 1.0, None  # a reward is of the student's responses
        return [
            EvaluatedPart(student, self.on_policy, "on_policy"),
            EvaluatedPart(dataset, 1 - self.on_policy, "dataset"),
        ]

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        value = teacher.divergence_to(student, self.divergence)
        if self.distillation == 1:
            return value
        return self.distillation * value + (1 - self.distillation) * self._policy_loss(student, batch)

    @staticmethod
    def _policy_loss(student: Scores, batch: Batch) -> Tensor:
        """(N,) −|y| (r − r̄) log q(y_t), whose mean over the tokens of a response is −(r − r̄) log q(y)."""
        factor = batch.stream("advantage") * batch.lengths[batch.sequence_ids]
        return -factor * student.reweighted(factor).chosen

    def metrics(self, teacher: Scores, student: Scores, batch: Batch) -> dict[str, Tensor]:
        """The rewards of the responses, in total and by function."""
        names = () if self.reward is None else self.reward.names
        return {name: batch.per_sequence(batch.stream(name)) / batch.lengths for name in names}
