"""Supervised fine-tuning: maximum likelihood of the dataset's responses.

    L = −E_{(x,y)~data} log q(y|x)

The baseline of every distillation paper, and the warm start that GKD, PromptKD and DPKD presuppose.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batch import Batch, Reduction
from ..method import Method
from ..scores import Scores
from ..teacher import Capability


@dataclass
class SFT(Method):
    """Maximum likelihood of the dataset's responses; needs no teacher."""

    paper: ClassVar[str] = "the baseline of MiniLLM (Gu et al., ICLR 2024), https://arxiv.org/abs/2306.08543"

    reduction: Reduction = "token"

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset()

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        return -student.chosen
