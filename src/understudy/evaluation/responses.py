"""Generate a response to every prompt of a dataset for each seed, in a file from which an interrupted run is resumed.

Responses are appended to the file a batch at a time; those that are there already are not generated again. A line of
another model, prompt or sampling is refused, and so is a second process that would append to the same file.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..batch import Author, Example
from ..data.examples import Examples
from ..data.formats import Row
from ..generation.response_file import ResponseFile
from ..models.fingerprint import fingerprint
from ..rollout import Rollout
from ..sampling import Sampling
from ..step import Step

IsCorrect = Callable[[str, Row], bool | None]


@dataclass(frozen=True)
class Response:
    """One response: the example with its token ids, and its line in the file."""

    example: Example
    line: dict[str, Any]  # seed, row, prompt, response, references, correct, truncated, tokens, id


@dataclass(frozen=True)
class Responses:
    """All responses, seed after seed in the order of the rows, and tokens and seconds of those that were generated."""

    responses: list[Response]
    tokens: int
    seconds: float

    def by_seed(self, prompts: int) -> list[list[Response]]:
        """The responses to the same `prompts` prompts, a list for each seed."""
        return [self.responses[start : start + prompts] for start in range(0, len(self.responses), prompts)]


class BatchSizeSearch:
    """Search for the fastest number of responses generated at once: doubled while tokens per second increase."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._growing = True
        self._fastest = (0.0, size)  # (tokens per second, size)

    def record(self, count: int, tokens: int, seconds: float) -> None:
        """Record the speed of `count` responses generated at once; fewer than `size`, the last ones, are ignored."""
        if self._growing and count >= self.size:
            speed = tokens / max(seconds, 1e-9)
            self._growing = speed > 1.1 * self._fastest[0]
            if self._growing:
                self._fastest = (speed, self.size)
                self.size *= 2
            else:
                self.size = self._fastest[1]

    def shrink(self) -> None:
        """Halve the size after running out of memory, and grow no more."""
        self.size, self._growing = self.size // 2, False


def generate_responses(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    rollout: Rollout,
    sampling: Sampling,
    seeds: Sequence[int],
    is_correct: IsCorrect,
    *,
    author: Author = "student",
    path: Path | None = None,
    search: BatchSizeSearch | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
    prompt_tokens: bool = False,
) -> Responses:
    """Generate a response of `model` to every prompt by `rollout`, once for each seed; longest prompts first.

    Args:
        is_correct: from a text and its row to whether it is a correct response, None where that is unknown.
        path: a JSONL file of responses; those that it already contains are not generated again.
        search: for the number of responses generated at once; None: the rollout's own `batch_size`.
        on_progress: called with the number of further responses, those from the file first.
        prompt_tokens: write the prompts' ids as well, so that the file can be read as a dataset.

    Raises:
        ValueError: for a sampling with several responses per prompt, for a file with responses of another model, prompt
            or sampling, and for one that another process is appending to.
    """
    if sampling.n != 1:
        raise ValueError("for several responses to a prompt give several seeds, and leave the sampling's n at 1")
    rollout = rollout.bind(model, tokenizer, author)
    file = ResponseFile(path, {} if path is None else identity(model, rollout, sampling, author))
    prompts = _prompts(examples)

    def response(seed: int, example: Example, text: str) -> Response:
        row = examples.rows[example.row]
        columns = {"prompt": row.prompt, "response": text, "references": list(row.references)}
        columns |= {"prompt_tokens": example.prompt} if prompt_tokens else {}
        return Response(example, file.line(seed, example, **columns, correct=is_correct(text, row)))

    tokens, seconds = 0, 0.0
    if not file.has_lock:
        _resumed(file, seeds, prompts, author)  # check the file before a lock is created beside it
    with file.locked():
        resumed = _resumed(file, seeds, prompts, author)
        responses = {key: response(key[0], *value) for key, value in resumed.items()}
        file.drop_torn_line()
        on_progress(len(responses))
        for seed in seeds:
            missing = [prompt for prompt in prompts if (seed, prompt.row) not in responses]
            for generated, batch_seconds in _generate(missing, rollout, sampling, search, Step(0, seed)):
                texts = tokenizer.batch_decode([example.response for example in generated], skip_special_tokens=True)
                batch = [response(seed, example, text) for example, text in zip(generated, texts, strict=True)]
                file.append([item.line for item in batch])
                responses |= {(seed, item.example.row): item for item in batch}
                tokens, seconds = tokens + _tokens(generated), seconds + batch_seconds
                on_progress(len(generated))
    return Responses([responses[seed, prompt.row] for seed in seeds for prompt in prompts], tokens, seconds)


def check_resumable(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    rollout: Rollout,
    sampling: Sampling,
    seeds: Sequence[int],
    author: Author,
    path: Path,
) -> None:
    """Check that a file of responses, if there is one, can be continued by this model; does not change it.

    Raises:
        ValueError: as `generate_responses`.
    """
    if path.is_file():
        file = ResponseFile(path, identity(model, rollout.bind(model, tokenizer, author), sampling, author))
        _resumed(file, seeds, _prompts(examples), author)


def _prompts(examples: Examples) -> list[Example]:
    return [replace(example.last_turn(), row=row) for row, example in enumerate(examples.examples)]


def identity(model: Any, rollout: Rollout, sampling: Sampling, author: Author) -> dict[str, Any]:
    """Everything that a response depends on besides seed and prompt: weights, author, rollout and sampling."""
    return {"author": author, "weights": fingerprint(model), "rollout": type(rollout).__name__, **asdict(sampling)}


def _resumed(
    file: ResponseFile, seeds: Sequence[int], prompts: Sequence[Example], author: Author
) -> Mapping[tuple[int, int], tuple[Example, str]]:
    """The file's responses to these seeds and prompts, with their texts, by seed and row; others are left out.

    Raises:
        ValueError: as `ResponseFile.load`, and for a response of another model, to another prompt or of other sampling.
    """
    resumed = {}
    for number, line in enumerate(file.load(), 1):
        if line["seed"] in seeds and line["row"] in range(len(prompts)):
            prompt = replace(prompts[line["row"]], author=author)
            if line["id"] != file.id(line["seed"], prompt):
                raise file.error(number, "a response of another model, to another prompt or of other sampling")
            example = replace(prompt, response=line["tokens"], truncated=line["truncated"])
            resumed[line["seed"], line["row"]] = example, str(line.get("response", ""))
    return resumed


def _generate(
    prompts: Sequence[Example], rollout: Rollout, sampling: Sampling, search: BatchSizeSearch | None, step: Step
) -> Iterator[tuple[list[Example], float]]:
    """Batches of responses, longest prompts first, with the seconds of each; smaller ones where memory runs out."""
    missing = sorted(prompts, key=lambda prompt: len(prompt.prompt), reverse=True)
    while missing:
        if search is not None:
            rollout = rollout.with_batch_size(search.size)
        count = (rollout.batch_size or len(missing)) if search is None else search.size
        start = time.perf_counter()
        try:
            generated = rollout.generate(missing[:count], sampling, step)
        except torch.OutOfMemoryError:
            if search is None or search.size == 1:
                raise
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            search.shrink()
            continue
        seconds = time.perf_counter() - start
        if search is not None:
            search.record(len(generated), _tokens(generated), seconds)
        del missing[: len(generated)]
        yield generated, seconds


def _tokens(responses: Sequence[Example]) -> int:
    return sum(len(example.response) for example in responses)
