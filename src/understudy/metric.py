"""A metric: how good written answers are, given the right ones."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Score:
    """A number for all answers together, and how it was come by, in words that another paper could repeat."""

    value: float  # out of 100, as papers print it
    signature: str


class Metric(ABC):
    """One kind of judgement, which may give several numbers at once. Subclasses are final."""

    names: ClassVar[tuple[str, ...]]  # of the numbers that it gives
    among_answers: ClassVar[bool] = False  # are an answer's references the other answers to its prompt?

    @abstractmethod
    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        """Judge answers, each beside its own references, of which there is at least one, as many as there may be.

        Returns a score for every one of `names`.
        """
