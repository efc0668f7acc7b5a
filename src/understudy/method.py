"""A distillation method: what to train on, and what to minimise.

Everything else (models, batching, distribution, resuming, logging) is written once, elsewhere, for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .batch import Author, Batch, Example, Reduction
from .rollout import Writers
from .scores import Knowledge, Scores
from .step import Step


class Method(ABC):
    """Subclass this once per paper, as a dataclass whose fields are the paper's hyperparameters and defaults.

    A subclass is final: no method inherits from another; what two share is a divergence or a function. It is found by
    its file's name in `understudy.methods`.
    """

    paper: ClassVar[str]  # authors, year, where to read it
    reduction: Reduction = "token"  # what the mean of the loss is over; see `Batch.weights`
    corpus: Sequence[Example] | None = None  # plain texts, given by the run to methods that begin with an empty one

    @property
    def needs(self) -> Knowledge:
        """What the teacher must be able to tell."""
        return Knowledge.DISTRIBUTION

    @property
    def authors(self) -> frozenset[Author]:
        """Whose responses the method may train on; the dataset must have some only if "dataset" is among them."""
        return frozenset({"dataset"})

    @property
    def context(self) -> int:
        """How many positions of the teacher's window the method takes for itself."""
        return 0

    @property
    def watched(self) -> tuple[str, ...]:
        """The names of what `observe` returns, the same on every process."""
        return ()

    def prepare(self, teacher: Any, tokenizer: Any, learning_rate: float) -> Any:
        """The teacher whose scores `loss` is to see, given the run's; called once, before training."""
        return teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        """The examples to train on at this step, given those drawn from the dataset. Default: these.

        Called once per optimizer step on every process. Whatever is decided at random must be decided by `step`.
        """
        return examples

    def weights(self, batch: Batch) -> Tensor:
        """(N,) what each response token's value counts in the step's sum."""
        return batch.weights(self.reduction)

    def units(self, batch: Batch) -> int:
        """What the sums of all of a step's micro-batches are divided by, together."""
        return batch.units(self.reduction)

    @abstractmethod
    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        """One value per response token, (N,), which the loop weighs by `weights`; or values of any other shape, which
        it only sums. Differentiable in the student."""

    def observe(self, student: Scores, teacher: Scores, batch: Batch) -> dict[str, Tensor]:
        """Values to watch, besides the loss, by their names in `watched`; their means are logged. Without gradients."""
        return {}

    def before_step(self, batches: list[Batch], student: Any, teacher: Any, step: Step) -> None:
        """Train what the method itself owns, on the micro-batches that the student is about to see."""

    def advance(self, step: Step) -> None:
        """Move schedules on; called once after each optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def export(self, folder: Path) -> None:
        """Save what the method learned besides the student, for others to use, when a run ends."""
