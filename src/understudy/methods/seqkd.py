"""Sequence-level knowledge distillation (Kim and Rush, EMNLP 2016).

    L = −E_{x~data, y~p(·|x)} log q(y|x)

The teacher answers every prompt once and the student imitates the answers: the forward KL between whole sequences, up
to a constant. The scripts that MiniLLM and PromptKD call SeqKD add the teacher's distribution on these answers:
`soft_weight=0.5` is that hybrid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import ForwardKL
from ..method import Method
from ..rollout import Writers
from ..scores import Knowledge, Scores
from ..step import Step


@dataclass
class SeqKD(Method):
    """Imitation of the teacher's answers; `soft_weight` mixes in KL(p‖q) on them."""

    paper: ClassVar[str] = "Kim and Rush, EMNLP 2016, https://arxiv.org/abs/1606.07947"

    soft_weight: float = 0.0
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"seqkd needs soft_weight between 0 and 1, not {self.soft_weight}")

    @property
    def needs(self) -> Knowledge:
        return Knowledge.DISTRIBUTION if self.soft_weight else Knowledge.NOTHING

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"teacher"})

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        return writers.teacher(examples, step)

    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        hard = -student.chosen
        if not self.soft_weight:
            return hard
        return (1 - self.soft_weight) * hard + self.soft_weight * ForwardKL().between(teacher, student)
