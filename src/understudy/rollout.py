"""A rollout: an engine that generates responses to prompts with a model."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from .batch import Author, Example
from .sampling import Sampling
from .step import Step

WEIGHT_VERSION = "weight_version"  # the column of a response with the optimizer steps behind its weights
SAMPLED_LOGPROB = "sampled_logprob"  # the stream of `Sampling.logprobs`


class Rollout(ABC):
    """Generates responses with the model that it is bound to. Subclasses are final.

    Constructor arguments are the engine's options; sampling parameters are passed to each call as a `Sampling`.
    """

    is_remote: ClassVar[bool] = False  # does another process generate, which may fail?
    authors: ClassVar[frozenset[Author]] = frozenset({"student", "teacher"})  # whose responses it can generate
    batch_size: int | None = None  # sequences generated at once; None: as many as there are
    runs_ahead: ClassVar[bool] = False  # may it generate in a thread while the model is trained? See `for_thread`

    @property
    def is_bound(self) -> bool:
        """Does this rollout have a model to generate with? Default: it has, as an engine with a model of its own."""
        return True

    def setup(self, folder: Path) -> None:
        """Called with the run's folder before `bind`; nothing may be written there before responses are generated."""

    @abstractmethod
    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> "Rollout":
        """A rollout like this one that generates with `model`, with its weights as they are at each call.

        This rollout itself is unchanged. `author` is recorded in the responses, and is part of their random seed.
        """

    def with_batch_size(self, batch_size: int) -> "Rollout":
        """A rollout like this one, bound to the same model, that generates `batch_size` sequences at once.

        Default: this rollout itself, for an engine that schedules by itself.
        """
        return self

    @abstractmethod
    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """Generate a response to the prompt of every example, in order (n consecutive ones where `sampling.n` is n).

        Responses are token ids, without gradients; each ends with its first stop token, or is `truncated`. Random
        numbers depend only on the step's seed and number, the author and the example's row.
        """

    def sync(self, step: Step) -> None:
        """The model's weights have changed. Default: nothing, for an engine that reads them at each call.

        Never called while this rollout generates, in whichever thread.
        """

    def for_thread(self, cancelled: threading.Event) -> "Rollout":
        """A rollout like this one that generates in another thread while this process trains the model.

        Called once a step, only where `runs_ahead`. The weights do not change until the thread has finished, and the
        random generators of the process must not be used. Once `cancelled` is set, generating should end soon with any
        error. Default: this rollout itself, for an engine that has the weights to itself until `sync`.
        """
        return self


def with_response(
    prompt: Example,
    response: list[int],
    author: Author,
    truncated: bool,
    streams: Mapping[str, Sequence[float]] | None = None,
) -> Example:
    """The example with another response; the `trained` mask and the streams of the previous one are dropped."""
    changes = {"response": response, "author": author, "truncated": truncated, "streams": dict(streams or {})}
    return replace(prompt, trained=None, **changes)


@dataclass(frozen=True)
class Writer:
    """A rollout bound to a model, with the sampling parameters of the run."""

    rollout: Rollout
    sampling: Sampling = field(default_factory=Sampling)

    def __call__(self, prompts: Sequence[Example], step: Step, **sampling_changes: Any) -> list[Example]:
        """Responses in the `last_turn` of `prompts`; the keywords replace fields of the sampling, such as n=1."""
        sampling = replace(self.sampling, **sampling_changes) if sampling_changes else self.sampling
        return self.rollout.generate([prompt.last_turn() for prompt in prompts], sampling, step)


@dataclass(frozen=True)
class Writers:
    """The models that can generate responses in a run; a missing one raises an error that says how to add it."""

    _student: Writer | None = None
    _teacher: Writer | None = None

    def with_student(self, writer: Writer) -> "Writers":
        """The same with another writer of the student's responses."""
        return replace(self, _student=writer)

    def can_generate(self, authors: Iterable[Author]) -> bool:
        """Is there a rollout of each of these authors that generates?"""
        writers = {"student": self._student, "teacher": self._teacher}
        return all(writers.get(author, True) is not None for author in authors)

    def check(self, authors: Iterable[Author]) -> None:
        """Refuse a method's authors of which one cannot generate.

        Raises:
            ValueError: with the remedy.
        """
        for author in sorted({"student", "teacher"}.intersection(authors)):
            getattr(self, author)

    @property
    def student(self) -> Writer:
        if self._student is None:
            raise ValueError("this method trains on the student's own responses: give it a rollout, such as generate")
        return self._student

    @property
    def teacher(self) -> Writer:
        if self._teacher is None:
            raise ValueError(
                "this method trains on the teacher's responses: give it a rollout and a teacher that can generate, or "
                "a teacher_rollout"
            )
        return self._teacher
