"""A distillation method: what to train on, and what to minimise.

Everything else (models, batching, distribution, resuming, logging) is shared by all methods and lives elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .batch import Author, Batch, Example, Reduction
from .divergences import Divergence
from .rollout import Writers
from .sampling import Sampling
from .scores import Scores
from .step import Step
from .teacher import Capability, Teacher


@dataclass(frozen=True)
class MethodContext:
    """What a run gives to its method before training."""

    teacher: Teacher | None
    tokenizer: Any
    vocabulary: int  # the number of real tokens, where models pad theirs beyond them
    learning_rate: float
    corpus: Sequence[Example] = ()  # plain texts with one token as the prompt, for methods that use a corpus


class EvaluatedPart(NamedTuple):
    """A part of what a method's held-out loss is composed of; its own loss is logged as `eval_loss_<name>`."""

    method: "Method"  # what is evaluated; it generates all its responses anew
    share: float = 1.0  # of the held-out loss; a part without a share is only logged, where it can be measured
    name: str = ""  # without a name the part is the whole


def for_divergence(divergence: Divergence) -> frozenset[Capability]:
    """What a teacher must provide for a divergence: its top tokens, or all of them where both sides are softened."""
    return frozenset({Capability.TOP_K if divergence.temperature == 1.0 else Capability.FULL})


_Item = TypeVar("_Item")


def is_distributed() -> bool:
    """Does this run have several processes?"""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_rank() -> int:
    """The number of this process among those of the run."""
    return torch.distributed.get_rank() if is_distributed() else 0


def from_all_processes(items: list[_Item], group: Any = None) -> list[_Item]:
    """The lists of all processes one after the other, on every process; all must call this equally often.

    Args:
        group: a process group of all of them, for a thread beside which another one communicates.
    """
    if not is_distributed():
        return items
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


class Method(ABC):
    """Base class of methods: one subclass per paper, a dataclass of the paper's hyperparameters and their defaults.

    A subclass is final: no method inherits from another; code that two share is a divergence or a function. A recipe
    names it by its file in `understudy.methods`, or as `my_module:MyMethod`.
    """

    paper: ClassVar[str] = ""  # authors, year, where to read it
    late_weights: ClassVar[bool] = False  # are the rows' weights known only after the loss? See `Scores`
    uses_corpus: ClassVar[bool] = False  # does it train on the recipe's corpus as well?
    collects_ahead: ClassVar[bool] = False  # may `collect` run in a thread while the step before is learned from?
    reduction: Reduction = "token"  # what the mean of the loss is over; see `Batch.weights`

    @property
    def requires(self) -> frozenset[Capability]:
        """What the teacher must provide."""
        return frozenset({Capability.TOP_K})

    @property
    def authors(self) -> frozenset[Author]:
        """Whose responses the method may train on; the dataset needs responses only if "dataset" is among them."""
        return frozenset({"dataset"})

    @property
    def teacher_prefix_tokens(self) -> int:
        """How many positions of the teacher's context window the method uses before every prompt."""
        return 0

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse sampling parameters that the method cannot follow. Called before models are loaded.

        Raises:
            ValueError: naming the parameter; by default for several responses per prompt where none is generated.
        """
        if sampling.n > 1 and self.authors == {"dataset"}:
            raise ValueError(
                f"{type(self).__name__} trains on the dataset's responses, of which there is one per row: set the "
                f"rollout's n to 1, not {sampling.n}"
            )

    def setup(self, context: MethodContext) -> Teacher | None:
        """Prepare for a run; called once, before training. Returns the teacher whose scores are passed to `loss`."""
        return context.teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        """The examples to train on at this step, from `examples` of the dataset. Default: the same.

        Called once per optimizer step on every process. Random decisions must come from `step`. Responses are generated
        by `writers.student(examples, step)` and `writers.teacher(examples, step)`.

        With `collects_ahead` and a rollout's `ahead` it is called for the next step in a thread, while `loss` and
        `before_step` of this one run: then it must use nothing that these change, no model but the student by
        `writers.student`, and no communication between processes.
        """
        return examples

    @abstractmethod
    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        """One value per response token, (N,), which is multiplied by `batch.weights(reduction)`; or values of any other
        shape, which are only summed. The sum over a step is divided by its `batch.normalizer(reduction)`.

        Differentiable in the student. `teacher` is None for methods that require nothing of a teacher.
        """

    def metrics(self, teacher: Scores, student: Scores, batch: Batch) -> dict[str, Tensor]:
        """Values to log besides the loss, by name; their means are logged. Called without gradients."""
        return {}

    def before_step(self, batches: list[Batch], teacher: Any, student: Any, step: Step) -> None:
        """Train the method's own parameters on this step's micro-batches, before the student is trained on them."""

    def after_step(self, step: Step) -> None:
        """Advance schedules; called once after each optimizer step."""

    def evaluated_parts(self) -> list[EvaluatedPart]:
        """What evaluation on held-out data measures. Default: the method itself, whose state is restored afterwards."""
        return [EvaluatedPart(self)]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint for an exact resume.

        The first process's are saved, and every process loads them, whose number may be another one. So a state must be
        the same on all processes. What a process collects from its own rows is shared by `from_all_processes` when it
        is collected, keyed by row.
        """
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def export(self, folder: Path) -> None:
        """Save what the method learned besides the student, for others to use, when a run ends."""
