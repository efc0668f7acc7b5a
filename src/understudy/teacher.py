"""A teacher: something that says what it thinks of every response token of a batch."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from .batch import Batch
from .scores import Knowledge, Scores


class Teacher(ABC):
    """Scores a batch, without gradients. Subclasses are final; `gives` says how much they can tell."""

    gives: ClassVar[Knowledge]

    def beside(self, device: torch.device) -> None:
        """Come to the student's device, if this teacher can move and was not told where to be."""

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """The teacher's Scores of the batch's N response tokens, row for row in the order of `batch.tokens`."""
