"""A rollout: something that writes responses to prompts for a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .batch import Author, Example
from .step import Step


class Rollout(ABC):
    """Writes responses for the model that it follows. Subclasses are final."""

    @abstractmethod
    def follow(self, model: Any, tokenizer: Any, author: Author = "student") -> "Rollout":
        """Write for `model` from now on, with its weights as they are at each call. Returns the rollout itself."""

    @abstractmethod
    def generate(self, prompts: Sequence[Example], step: Step) -> list[Example]:
        """A response to the prompt of every example, in their order (n consecutive ones where n are asked for).

        Ids only, no gradients. The response ends with the first stop token, which it includes, or is `truncated`.
        What is drawn depends on the step's seed and number and on the example's row, on nothing else.
        """


@dataclass(frozen=True)
class Writers:
    """Who can write responses in a run. Asking for somebody absent is an error that says what to do."""

    _student: Rollout | None = None
    _teacher: Rollout | None = None

    @property
    def student(self) -> Callable[..., list[Example]]:
        if self._student is None:
            raise ValueError("this method trains on the student's own responses: give it a rollout, such as generate")
        return self._student.generate

    @property
    def teacher(self) -> Callable[..., list[Example]]:
        if self._teacher is None:
            raise ValueError(
                "this method trains on the teacher's responses: give it a rollout and a teacher that can write"
            )
        return self._teacher.generate
