"""A rollout that generates each response once and caches it in a JSONL file, for models that do not change."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..batch import Author, Example
from ..files import append_jsonl, read_jsonl
from ..rollout import Rollout, with_response
from ..sampling import Sampling
from ..step import Step

Key = tuple[int, str]  # a dataset row, and a digest of its prompt, the sampling parameters and the seed


class CachedResponse(NamedTuple):
    """One response, as a line of the file has it."""

    tokens: list[int]
    truncated: bool
    streams: dict[str, Sequence[float]]


class CachedRollout(Rollout):
    """The responses of `rollout` per dataset row, prompt and sampling, generated once and read from `path` after that.

    For a teacher, whose weights stay the same. All responses are drawn as at step 0, so that they do not depend on when
    they were asked for, and losing the file costs time only. The file is read at the first call: a run that is
    restarted has deleted it by then.
    """

    def __init__(self, rollout: Rollout, path: Path) -> None:
        self.rollout, self.path, self.batch_size = rollout, path, rollout.batch_size
        self._responses: dict[Key, list[CachedResponse]] | None = None

    def bind(self, model: Any, tokenizer: Any, author: Author = "teacher") -> "CachedRollout":
        """As of `Rollout`."""
        return CachedRollout(self.rollout.bind(model, tokenizer, author), self.path)

    def with_batch_size(self, batch_size: int) -> "CachedRollout":
        """As of `Rollout`."""
        return CachedRollout(self.rollout.with_batch_size(batch_size), self.path)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """As of `Rollout`."""
        step = replace(step, number=0)
        cache = self._responses = self._read() if self._responses is None else self._responses
        keys = [_key(example, sampling, step) for example in prompts]
        missing = {key: e for key, e in zip(keys, prompts, strict=True) if key not in cache}
        if missing:
            generated = iter(self.rollout.generate(list(missing.values()), sampling, step))
            self._store(cache, {key: [_cached(next(generated)) for _ in range(sampling.n)] for key in missing})
        return [
            with_response(example, response.tokens, "teacher", response.truncated, response.streams)
            for key, example in zip(keys, prompts, strict=True)
            for response in cache[key]
        ]

    def _read(self) -> dict[Key, list[CachedResponse]]:
        responses = {}
        for line in read_jsonl(self.path):
            try:
                responses[line["row"], line["key"]] = [CachedResponse(*response) for response in line["responses"]]
            except (KeyError, TypeError):  # of another version
                continue
        return responses

    def _store(self, cache: dict[Key, list[CachedResponse]], responses: Mapping[Key, list[CachedResponse]]) -> None:
        cache |= responses
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, *({"row": row, "key": key, "responses": r} for (row, key), r in responses.items()))


def _cached(example: Example) -> CachedResponse:
    return CachedResponse(example.response, example.truncated, dict(example.streams))


def _key(example: Example, sampling: Sampling, step: Step) -> Key:
    """The row, and a digest of its prompt and of what the random numbers depend on.

    The prompt belongs to it because held-out rows are numbered from 0, as those of the training set are.
    """
    digest = hashlib.blake2b(array("q", example.prompt).tobytes(), digest_size=8)
    digest.update(repr((sampling, step.seed)).encode())
    return example.row, digest.hexdigest()
