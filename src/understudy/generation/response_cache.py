"""Answers that are written once: a rollout that keeps what another one wrote, row by row, in a file beside the run."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batch import Author, Example
from ..rollout import Rollout
from ..step import Step


class KeptAnswers(Rollout):
    """One answer per dataset row and prompt, written by `rollout` when first asked for and read from `path` ever after.

    For a teacher, who does not change. Every answer is drawn as at step 0, so a row's answer does not depend on when it
    was asked for, and losing the file costs time only.
    """

    def __init__(self, rollout: Rollout, path: Path) -> None:
        self.rollout, self.path = rollout, path
        self._kept: dict[tuple[int, str], tuple[list[int], bool]] | None = None  # until it is asked the first time
        self._cut = False  # does the file end within a line, as a killed run leaves it?

    def _read(self) -> dict[tuple[int, str], tuple[list[int], bool]]:
        """What the file has when the first answer is asked for: a run that begins again has deleted it by then."""
        kept: dict[tuple[int, str], tuple[list[int], bool]] = {}
        if self.path.exists():
            text = self.path.read_text()
            self._cut = not text.endswith("\n")
            for line in text.splitlines():
                try:
                    row, prompt, response, truncated = json.loads(line)
                except (ValueError, TypeError):
                    continue
                kept[row, prompt] = response, truncated
        return kept

    def follow(self, model: Any, tokenizer: Any, author: Author = "teacher") -> "KeptAnswers":
        self.rollout.follow(model, tokenizer, author)
        return self

    def generate(self, prompts: Sequence[Example], step: Step) -> list[Example]:
        if self._kept is None:
            self._kept = self._read()
        keys = [_key(e) for e in prompts]
        missing = {key: e for key, e in zip(keys, prompts, strict=True) if key not in self._kept}
        if missing:
            written = self.rollout.generate(list(missing.values()), replace(step, number=0))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._kept |= {_key(e): (e.response, e.truncated) for e in written}
            lines = [json.dumps([*_key(e), e.response, e.truncated]) + "\n" for e in written]
            with self.path.open("ab", buffering=0) as file:  # one write, which other processes' do not come between
                file.write(("\n" * self._cut + "".join(lines)).encode())
            self._cut = False
        kept = [(e, *self._kept[key]) for key, e in zip(keys, prompts, strict=True)]
        return [replace(e, response=r, author="teacher", truncated=truncated) for e, r, truncated in kept]


def _key(example: Example) -> tuple[int, str]:
    """The row and a digest of its prompt: held-out rows are numbered from 0 as the trained ones are."""
    digest = hashlib.blake2b(array("q", example.prompt).tobytes(), digest_size=8)
    return example.row, digest.hexdigest()
