"""A teacher: the log-probabilities of every response token of a batch, from a model in this process or elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, ClassVar

import torch

from .batch import Batch
from .scores import Scores


class Capability(Enum):
    """What a teacher can provide; a teacher has a set of these, and a method requires one."""

    CHOSEN = "chosen"  # the log-probability of the response tokens that are there
    TOP_K = "top_k"  # the likeliest K tokens, and with them the probability of any other
    FULL = "full"  # the log-probability of every token
    MODEL = "model"  # a live model that can generate, and be differentiated


class Teacher(ABC):
    """Scores a batch, without gradients. Subclasses are final; constructor arguments are the recipe's fields.

    A constructor is cheap: a model is loaded when it is first used, so that mistakes elsewhere are reported first.
    """

    provides: ClassVar[frozenset[Capability]]
    model_name: str | None = None  # name or folder from which transformers can load the configuration and weights
    model: Any = None  # the live model, where MODEL is provided

    @property
    def tokenizer_name(self) -> str | None:
        """Name or folder of the tokenizer that the teacher reads with; None: not known, and not compared."""
        return self.model_name

    def to(self, device: torch.device) -> None:
        """Move to the student's device, if this teacher can move and was not told where to be."""

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Told all batches of an optimizer step before the first is scored, so that a server can work concurrently."""

    def can(self, capability: Capability) -> bool:
        """Does this teacher provide it, or something that includes it?"""
        return covers(self.provides, frozenset({capability}))

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """The teacher's Scores of the batch's N response tokens, in the order of `batch.tokens`.

        A teacher reads `batch.as_read_by_teacher()`, whose rows are the same behind the teacher's own prompts.
        """


def covers(provided: frozenset[Capability], required: frozenset[Capability]) -> bool:
    """Is all that is required also provided? FULL includes CHOSEN and TOP_K."""
    if Capability.FULL in provided:
        provided |= {Capability.CHOSEN, Capability.TOP_K}
    return required <= provided


def describe(capabilities: Iterable[Capability]) -> str:
    """Capabilities for people: "chosen and top_k"."""
    return " and ".join(sorted(capability.value for capability in capabilities)) or "nothing"
