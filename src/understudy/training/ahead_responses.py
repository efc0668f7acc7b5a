"""The responses that a rollout generated ahead of a step: recorded, saved in a checkpoint, and used once more.

A method's `collect` is a function of its step and of the responses that it asks for. So a resumed run repeats it with
the recorded responses in the place of a rollout, whose weights of the step before are gone.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..batch import Author, Example
from ..files import write_atomic
from ..method import from_all_processes, process_rank
from ..rollout import WEIGHT_VERSION, Rollout, with_response
from ..sampling import Sampling
from ..step import Step

FILE = "ahead.json"
logger = logging.getLogger(__name__)


class _Response(NamedTuple):
    author: Author
    tokens: list[int]
    truncated: bool
    streams: dict[str, list[float]]
    columns: dict[str, int]  # of the rollout's own


class _Call(NamedTuple):
    """One call of the rollout's `generate`."""

    key: str  # a digest of prompts and sampling
    responses: list[_Response]


@dataclass(frozen=True)
class RecordedResponses:
    """The rollout's answers to the calls of one `collect`, in their order."""

    calls: list[_Call]


class RecordingRollout(Rollout):
    """Records what another rollout generates."""

    def __init__(self, rollout: Rollout, recorded: RecordedResponses) -> None:
        self._rollout, self._recorded = rollout, recorded

    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> Rollout:
        """See `Rollout`."""
        return RecordingRollout(self._rollout.bind(model, tokenizer, author), self._recorded)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`."""
        examples = self._rollout.generate(prompts, sampling, step)
        self._recorded.calls.append(_Call(_key(prompts, sampling), [_recorded(example) for example in examples]))
        return examples


class ReplayingRollout(Rollout):
    """Returns recorded responses; where others are asked for than were recorded, `rollout` generates them."""

    def __init__(self, recorded: RecordedResponses, rollout: Rollout) -> None:
        self._calls, self._rollout = iter(recorded.calls), rollout

    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> Rollout:
        """See `Rollout`."""
        return self._rollout.bind(model, tokenizer, author)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`."""
        call = next(self._calls, None)
        if call is None or call.key != _key(prompts, sampling):
            logger.warning(
                "the checkpoint's responses to the prompts of step %s are of other data or sampling parameters than "
                "this run's, and are generated again",
                step.number,
            )
            return self._rollout.generate(prompts, sampling, step)
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        return [_with_recorded(*pair) for pair in zip(repeated, call.responses, strict=True)]


def _recorded(example: Example) -> _Response:
    streams = {name: list(values) for name, values in example.streams.items()}
    columns = {name: value for name, value in example.columns.items() if name == WEIGHT_VERSION}
    return _Response(example.author, example.response, example.truncated, streams, columns)


def _with_recorded(prompt: Example, response: _Response) -> Example:
    example = with_response(prompt, response.tokens, response.author, response.truncated, response.streams)
    return replace(example, columns={**example.columns, **response.columns})


def _key(prompts: Sequence[Example], sampling: Sampling) -> str:
    content = repr(([(e.row, e.prompt, e.teacher_prompt) for e in prompts], sampling))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def save_responses(folder: Path, responses: RecordedResponses | None, writes: bool) -> None:
    """Save the responses of all processes in a checkpoint; called on every process."""
    by_process = from_all_processes([responses])
    if writes and any(by_process):
        write_atomic(folder / FILE, json.dumps([each.calls if each else None for each in by_process]))


def load_responses(folder: Path, processes: int) -> RecordedResponses | None:
    """What `save_responses` saved for this process; None where nothing was, or for another number of processes."""
    path = folder / FILE
    if not path.is_file():
        return None
    by_process = json.loads(path.read_text(encoding="utf-8"))
    if len(by_process) != processes:
        logger.warning(
            "the responses that %s processes generated ahead are generated again by %s", len(by_process), processes
        )
        return None
    calls = by_process[process_rank()]
    return calls and RecordedResponses([_Call(key, [_Response(*r) for r in responses]) for key, responses in calls])
