"""A teacher: the log-probabilities of every response token of a batch, from a model in this process or elsewhere."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .data.examples import Examples
from .models.load import ModelSource
from .scores import Scores
from .step import Step

if TYPE_CHECKING:
    from .rollout import Rollout


class Capability(Enum):
    """What a teacher can provide; a teacher has a set of these, and a method requires one."""

    CHOSEN = "chosen"  # the log-probability of the response's own tokens
    TOP_K = "top_k"  # the log-probabilities of the K likeliest tokens; all other tokens together are one event
    FULL = "full"  # the log-probability of every token
    MODEL = "model"  # a live model that can generate, and be differentiated


class TeacherError(Exception):
    """A teacher or a rollout outside this process does not answer, or wrongly; the message is one sentence.

    In training it ends the run with a checkpoint, from which the same command resumes.

    Args:
        on_all_processes: do all processes of the run raise it at the same place?
        checkpoint: the one that was saved since.
    """

    def __init__(self, message: str, on_all_processes: bool = False, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.on_all_processes, self.checkpoint = on_all_processes, checkpoint


class Teacher(ABC):
    """Scores a batch, without gradients. Subclasses are final; constructor arguments are the recipe's fields.

    A constructor is cheap: a model is loaded when it is first used, so that mistakes elsewhere are reported first.
    """

    provides: frozenset[Capability]  # of the class, or of an instance where it depends on the arguments
    teachers: Mapping[str, "Teacher"] = MappingProxyType({})  # those that this one consists of, by name
    model_name: str | None = None  # name or folder from which transformers can load the configuration and weights
    source: ModelSource | None = None  # what its model in this process is loaded from, if it is loaded by name
    model: Any = None  # the live model, where MODEL is provided
    fused: Any = False  # may the live model's head be taken out of its forward, so that (B, T, V) is never held?
    follows_student: bool = False  # do its weights change with the student's?
    fingerprint: str | None = None  # a hash of weights that are not in this process, known after `setup`
    tokenizer: Any = None  # its own, where it is not the student's; known after `setup`
    context_length: int | None = None  # of prompt and response, where no configuration is loaded that says it

    @property
    def tokenizer_name(self) -> str | None:
        """Name or folder of the teacher's tokenizer; None: unknown, and not compared with the student's."""
        return next((t.tokenizer_name for t in self.teachers.values() if t.tokenizer_name is not None), self.model_name)

    @property
    def own_tokenizer(self) -> str | None:
        """Name or folder of the tokenizer that the teacher reads with, where that may be another than the student's."""
        return self.tokenizer_name

    def parts(self) -> dict[str, "Teacher"]:
        """The teacher itself by an empty key; or those that it consists of, by their keys in its block of a recipe."""
        if not self.teachers:
            return {"": self}
        return {
            ".".join(filter(None, ("teachers", name, key))): part
            for name, teacher in self.teachers.items()
            for key, part in teacher.parts().items()
        }

    @property
    def columns(self) -> frozenset[str]:
        """The columns of the dataset that its scores depend on, besides prompt and response."""
        return frozenset(column for teacher in self.teachers.values() for column in teacher.columns)

    @property
    def scores_new_responses(self) -> bool:
        """Can it score any response, or only examples that are stored?"""
        return all(teacher.scores_new_responses for teacher in self.teachers.values())

    @property
    def needs_student(self) -> bool:
        """Does it have the student's weights, so that it can score only after `set_student`?"""
        return any(teacher.needs_student for teacher in self.teachers.values())

    @property
    def is_collective(self) -> bool:
        """Must all processes score equally often, because they gather the weights of a sharded model together?"""
        return any(teacher.is_collective for teacher in self.teachers.values())

    @property
    def local_model(self) -> Any:
        """The model in this process that the scores come from, loaded; None where there is none. A run records them."""
        return self.model

    def setup(self, tokenizer: Any) -> None:
        """Called with the student's tokenizer when a run is built, before weights are loaded, and possibly again.

        A teacher outside this process connects, and proves that it fits the tokenizer.

        Raises:
            ValueError, TeacherError: if the teacher cannot score the tokens of this tokenizer, with the remedy.
        """
        for teacher in self.teachers.values():
            teacher.setup(tokenizer)

    def to(self, device: torch.device) -> None:
        """Move to the student's device, unless the teacher has a device of its own or cannot be moved."""
        for teacher in self.teachers.values():
            teacher.to(device)

    def set_student(self, student: nn.Module) -> None:
        """Called once with the student, on its device and before training, for a teacher that has its weights.

        Raises:
            ValueError: if this student cannot be the teacher, with the remedy.
        """
        for teacher in self.teachers.values():
            teacher.set_student(student)

    def after_step(self, step: Step) -> None:
        """Called after each optimizer step, for a teacher whose weights follow the student's."""
        for teacher in self.teachers.values():
            teacher.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint for an exact resume; the same on all processes."""
        return {f"{name}.{key}": x for name, each in self.teachers.items() for key, x in each.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}
            teacher.load_state_dict(own)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Called with all batches of an optimizer step before the first is scored, so that a server can score them
        concurrently.
        """
        for teacher in self.teachers.values():
            teacher.prefetch(batches)

    def check_data(self, examples: Examples, settings: Mapping[str, Any]) -> None:
        """Refuse a dataset of which an example cannot be scored, before training. By default none is refused.

        Args:
            settings: of the recipe, on which the examples depend, so that an error can name one that was changed.

        Raises:
            ValueError: naming the first row that cannot be scored, and the remedy.
        """
        for teacher in self.teachers.values():
            teacher.check_data(examples, settings)

    def rollout(self) -> "Rollout | None":
        """The rollout that generates this teacher's responses, where it is no live model and can generate."""
        return None

    def can(self, capability: Capability) -> bool:
        """Does this teacher provide it, or something that includes it?"""
        return covers(self.provides, frozenset({capability}))

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """The teacher's Scores of the batch's N response tokens, in the order of `batch.tokens`.

        Score `batch.as_read_by_teacher()`: the same rows, after the teacher's own prompts.
        """


def covers(provided: frozenset[Capability], required: frozenset[Capability]) -> bool:
    """Do the provided capabilities include the required ones? FULL includes CHOSEN and TOP_K."""
    if Capability.FULL in provided:
        provided |= {Capability.CHOSEN, Capability.TOP_K}
    return required <= provided


def common_capabilities(teachers: Iterable[Teacher]) -> frozenset[Capability]:
    """What every one of several teachers can score; a model of its own none of them is to the others."""
    scoring = (Capability.CHOSEN, Capability.TOP_K, Capability.FULL)
    return frozenset(c for c in scoring if all(teacher.can(c) for teacher in teachers))


def check_weights(weights: Mapping[str, float], teachers: Mapping[str, Teacher]) -> None:
    """Refuse weights that are not one positive number for each teacher.

    Raises:
        ValueError: naming the teachers.
    """
    if weights.keys() != teachers.keys() or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f"weights needs a number above 0 for each of the teachers {', '.join(teachers)}")


def describe(capabilities: Iterable[Capability]) -> str:
    """Capabilities as text: "chosen and top_k"."""
    return " and ".join(sorted(capability.value for capability in capabilities)) or "nothing"
