"""Sequence-level knowledge distillation (Kim and Rush, EMNLP 2016).

    L = −E_{x~data, y~p(·|x)} log q(y|x)

The teacher generates a response to every prompt once and the student imitates the responses: the forward KL between
whole sequences, up to a constant. The scripts that MiniLLM and PromptKD call SeqKD add the teacher's distribution on
these responses: `soft_weight=0.5` is that hybrid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import ForwardKL
from ..method import Method
from ..rollout import Writers
from ..scores import Scores
from ..step import Step
from ..teacher import Capability


@dataclass
class SeqKD(Method):
    """Maximum likelihood of the teacher's responses; `soft_weight` mixes in KL(p‖q) on them."""

    paper: ClassVar[str] = "Kim and Rush, EMNLP 2016, https://arxiv.org/abs/1606.07947"

    soft_weight: float = 0.0
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"seqkd needs soft_weight between 0 and 1, not {self.soft_weight}")

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({Capability.TOP_K} if self.soft_weight else ())

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"teacher"})

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        return writers.teacher(examples, step)

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        hard = -student.chosen
        if not self.soft_weight:
            return hard
        return (1 - self.soft_weight) * hard + self.soft_weight * teacher.divergence_to(student, ForwardKL())
