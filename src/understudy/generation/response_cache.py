"""A cache of generated responses: a rollout that saves another rollout's responses in a JSONL file."""

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


class CachedRollout(Rollout):
    """Generates the responses to a dataset row and prompt once, by `rollout`, and reads them from `path` afterwards.

    For a teacher, whose weights do not change. Every response is sampled as at step 0, so it does not depend on the
    step that first needed it, and a lost file costs only time. Responses of another sampling or seed are not used. The
    prompt is part of a response's id because held-out rows are numbered from 0 like those of the training set.
    """

    def __init__(self, rollout: Rollout, path: Path) -> None:
        self.rollout, self.path, self.batch_size = rollout, path, rollout.batch_size
        self._lines: dict[str, list[dict[str, Any]]] | None = None  # by id; read when a response is first needed

    def bind(self, model: Any, tokenizer: Any, author: Author = "teacher") -> "CachedRollout":
        """See `Rollout`."""
        return CachedRollout(self.rollout.bind(model, tokenizer, author), self.path)

    def with_batch_size(self, batch_size: int) -> "CachedRollout":
        """See `Rollout`."""
        return CachedRollout(self.rollout.with_batch_size(batch_size), self.path)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`."""
        file = ResponseFile(self.path, asdict(sampling))
        if self._lines is None:  # not earlier: a restarted run deletes the file after this rollout is constructed
            self._lines = _read(self.path)
        ids = [file.id(step.seed, prompt) for prompt in prompts]
        missing = {
            key: prompt for key, prompt in zip(ids, prompts, strict=True) if len(self._lines.get(key, ())) < sampling.n
        }
        if missing or _has_other_processes():
            generated = self.rollout.generate(list(missing.values()), sampling, replace(step, number=0))
            lines = [
                file.line(step.seed, example, index=i % sampling.n, streams=_lists(example))
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
    for line in read_jsonl(path):
        if {"id", "index", "tokens", "truncated", "streams"} <= line.keys():
            lines.setdefault(str(line["id"]), {})[line["index"]] = line
    return {key: [group[i] for i in sorted(group)] for key, group in lines.items()}


def _lists(example: Example) -> dict[str, list[float]]:
    return {name: list(values) for name, values in example.streams.items()}
