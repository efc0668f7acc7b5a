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
    by_response: Sequence[float] = ()  # the number of every response, where `value` is their mean

    @classmethod
    def mean(cls, by_response: Sequence[float], signature: str) -> "Score":
        """The mean of numbers, one for each response: two models can then be compared prompt by prompt."""
        return cls(sum(by_response) / len(by_response), signature, by_response)


class Metric(ABC):
    """Scores responses against references; one class may compute several numbers at once. Subclasses are final."""

    names: ClassVar[tuple[str, ...]]  # of the numbers, by which they are selected and logged
    compares_responses: ClassVar[bool] = False  # are a response's references the other responses to its prompt?

    @abstractmethod
    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        """A score for every one of `names`. Each response has at least one reference of its own, perhaps several."""
