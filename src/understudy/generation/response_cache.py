"""A cache of generated responses: a rollout that saves another rollout's responses in a JSONL file."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..batch import Author, Example
from ..files import read_jsonl
from ..rollout import Rollout, with_response
from ..sampling import Sampling
from ..step import Step
from .response_file import ResponseFile

logger = logging.getLogger(__name__)
_COLUMNS = {"id", "index", "tokens", "truncated", "streams", "check"}


class CachedRollout(Rollout):
    """Generates the responses to a dataset row and prompt once, by `rollout`, and reads them from `path` afterwards.

    For a teacher, whose weights do not change during a run. Every response is sampled as at step 0, so it does not
    depend on the step that first needed it, and a lost file costs only time. Responses of other weights, sampling or
    seed are not used, and neither are lines that were changed afterwards. The prompt is part of a response's id because
    held-out rows are numbered from 0 like those of the training set.

    Args:
        weights: a hash of the weights of the rollout's model, and of whatever else its responses depend on.
    """

    def __init__(self, rollout: Rollout, path: Path, weights: str) -> None:
        self.rollout, self.path, self.weights, self.batch_size = rollout, path, weights, rollout.batch_size
        self._lines: dict[str, list[dict[str, Any]]] | None = None  # by id; read when a response is first needed

    def bind(self, model: Any, tokenizer: Any, author: Author = "teacher") -> "CachedRollout":
        """See `Rollout`."""
        return CachedRollout(self.rollout.bind(model, tokenizer, author), self.path, self.weights)

    @property
    def is_bound(self) -> bool:
        """See `Rollout`."""
        return self.rollout.is_bound

    def with_batch_size(self, batch_size: int) -> "CachedRollout":
        """See `Rollout`."""
        return CachedRollout(self.rollout.with_batch_size(batch_size), self.path, self.weights)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`."""
        file = ResponseFile(self.path, {**asdict(sampling), "weights": self.weights})
        if self._lines is None:  # not earlier: a restarted run deletes the file after this rollout is constructed
            self._lines = _read(self.path)
        ids = [file.id(step.seed, prompt) for prompt in prompts]
        missing = {
            key: prompt for key, prompt in zip(ids, prompts, strict=True) if len(self._lines.get(key, ())) < sampling.n
        }
        if missing or _has_other_processes():
            generated = self.rollout.generate(list(missing.values()), sampling, replace(step, number=0))
            lines = [
                _with_check(file.line(step.seed, example, index=i % sampling.n, streams=_lists(example)))
                for i, example in enumerate(generated)
            ]
            if lines:
                file.append(lines)
            self._lines |= {key: lines[i * sampling.n : (i + 1) * sampling.n] for i, key in enumerate(missing)}
        return [
            with_response(prompt, line["tokens"], "teacher", line["truncated"], line["streams"])
            for key, prompt in zip(ids, prompts, strict=True)
            for line in self._lines[key][: sampling.n]
        ]


def _has_other_processes() -> bool:
    """Do several processes generate? They must all call the rollout, which may gather a sharded model's weights."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the file by id; lines that are not responses are left out, and are generated again."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    changed = 0
    for line in read_jsonl(path):
        unchecked = {name: value for name, value in line.items() if name != "check"}
        if line.keys() >= _COLUMNS and line["check"] == _with_check(unchecked)["check"]:
            lines.setdefault(line["id"], {})[line["index"]] = line
        else:
            changed += 1
    if changed:
        logger.warning("%d responses in %s were changed and are generated again", changed, path)
    return {key: [group[i] for i in sorted(group)] for key, group in lines.items()}


def _with_check(line: dict[str, Any]) -> dict[str, Any]:
    """The line with a hash of itself, which shows later whether it is as it was generated."""
    return line | {"check": hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]}


def _lists(example: Example) -> dict[str, list[float]]:
    return {name: list(values) for name, values in example.streams.items()}
