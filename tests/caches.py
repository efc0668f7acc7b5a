"""Caches of a teacher's scores, for tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fakes import VOCABULARY, words

from understudy.batch import Batch, Example
from understudy.models.fingerprint import tokenizer_fingerprint
from understudy.run.write_scores import write_scores
from understudy.scores import Scores
from understudy.teacher import Capability, Teacher
from understudy.teachers.cached import CachedTeacher, Manifest, example_key


def write_cache(
    folder: Path,
    teacher: Teacher,
    examples: Iterable[Example],
    top_k: int | None = None,
    batch_size: int = 4,
    shard_mb: float = 64,
    **changes: Any,
) -> CachedTeacher:
    """Write scores to `folder`, in float32 and of hidden rows unless said otherwise, and return their teacher."""
    fields = {
        "kind": "hidden" if top_k is None else "top_k",
        "dtype": "float32",
        "vocabulary": VOCABULARY,
        "top_k": top_k,
        "chosen": teacher.can(Capability.CHOSEN),
        "teacher": "{}",
        "weights": None,
        "tokenizer": tokenizer_fingerprint(words()),
    }
    manifest = Manifest(**{**fields, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder)
    words().save_pretrained(folder / "tokenizer")
    write_scores(folder, manifest, teacher, {example_key(e): e for e in examples}, batch_size, shard_mb)
    return CachedTeacher(str(folder))


class Caching(Teacher):
    """A teacher whose scores are written to a cache first, and then read from there."""

    def __init__(self, folder: Path, teacher: Teacher, **options: Any) -> None:
        self.arguments, self.options = (folder, teacher), options
        self.provides = write_cache(*self.arguments, [], **options).provides

    def score(self, batch: Batch) -> Scores:
        return write_cache(*self.arguments, batch.examples, **self.options).score(batch)
