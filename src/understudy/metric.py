"""A metric: a number for the quality of generated responses, given references."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Score:
    """A number for all responses together, and a signature that says exactly how it was computed (as sacrebleu's)."""

    value: float  # out of 100, as papers print it
    signature: str


class Metric(ABC):
    """Scores responses against references; one class may compute several numbers at once. Subclasses are final."""

    names: ClassVar[tuple[str, ...]]  # of the numbers, by which they are selected and logged
    compares_responses: ClassVar[bool] = False  # are a response's references the other responses to its prompt?

    @abstractmethod
    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        """A score for every one of `names`. Each response has at least one reference of its own, perhaps several."""
