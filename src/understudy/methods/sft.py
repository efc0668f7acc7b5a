"""Supervised fine-tuning: maximum likelihood of the dataset's responses.

    L = −E_{(x,y)~data} log q(y|x)

The baseline of every distillation paper, and the warm start that GKD, PromptKD and DPKD presuppose.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batch import Batch, Reduction
from ..method import Method
from ..scores import Knowledge, Scores


@dataclass
class SFT(Method):
    """Maximum likelihood; needs no teacher."""

    paper: ClassVar[str] = "the baseline of MiniLLM (Gu et al., ICLR 2024), https://arxiv.org/abs/2306.08543"

    reduction: Reduction = "token"

    @property
    def needs(self) -> Knowledge:
        return Knowledge.NOTHING

    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        return -student.chosen
