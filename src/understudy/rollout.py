"""A rollout: an engine that generates responses to prompts with a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .batch import Author, Example
from .sampling import Sampling
from .step import Step

SAMPLED_LOGPROB = "sampled_logprob"  # the stream of `Sampling.logprobs`


class Rollout(ABC):
    """Generates responses with the model that it is bound to. Subclasses are final.

    Constructor arguments are the engine's options; what is drawn is the business of the `Sampling` of each call.
    """

    batch_size: int | None = None  # sequences generated at once; None: as many as there are

    @abstractmethod
    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> "Rollout":
        """A rollout like this one that generates with `model`, with its weights as they are at each call.

        This one stays as it is. `author` is whom the responses belong to, and part of what is drawn.
        """

    def with_batch_size(self, batch_size: int) -> "Rollout":
        """A rollout like this one, bound to the same model, that generates `batch_size` sequences at once.

        Default: this one, for an engine that schedules by itself.
        """
        return self

    @abstractmethod
    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """A response to the prompt of every example, in their order (n consecutive ones for `sampling.n` = n).

        Ids only, no gradients. A response ends with the first stop token, which it includes, or is `truncated`.
        What is drawn depends on the step's seed and number, the author and the example's row, on nothing else.
        """

    def sync(self, step: Step) -> None:
        """The model's weights have changed. Default: nothing, for an engine that reads them at each call."""


def with_response(
    prompt: Example,
    response: list[int],
    author: Author,
    truncated: bool,
    streams: Mapping[str, Sequence[float]] | None = None,
) -> Example:
    """The example with another response, without what belonged to the response before."""
    return replace(prompt, response=response, author=author, truncated=truncated, streams=dict(streams or {}))


@dataclass(frozen=True)
class Writer:
    """A rollout bound to a model, with the sampling parameters of the run."""

    rollout: Rollout
    sampling: Sampling = field(default_factory=Sampling)

    def __call__(self, prompts: Sequence[Example], step: Step, **sampling_changes: Any) -> list[Example]:
        """Responses to `prompts`; the keywords replace fields of the sampling, such as n=1, for this call."""
        sampling = replace(self.sampling, **sampling_changes) if sampling_changes else self.sampling
        return self.rollout.generate(prompts, sampling, step)


@dataclass(frozen=True)
class Writers:
    """The models that can generate responses in a run; asking for an absent one is an error with a remedy."""

    _student: Writer | None = None
    _teacher: Writer | None = None

    @property
    def student(self) -> Writer:
        if self._student is None:
            raise ValueError("this method trains on the student's own responses: give it a rollout, such as generate")
        return self._student

    @property
    def teacher(self) -> Writer:
        if self._teacher is None:
            raise ValueError(
                "this method trains on the teacher's responses: give it a rollout and a teacher that can generate"
            )
        return self._teacher
