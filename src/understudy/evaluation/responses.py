"""Answers to a dataset's prompts: written once for each seed, kept as they are made, and taken up where they stopped.

The one idea: an answer is a function of model, sampling, seed and prompt, so a line that names them stands for it. A
file of answers is only ever added to, a batch at a time in one write; what is there already is not written again, and
a line that belongs to something else is refused, and so is a second process that would write what the first one writes.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..batch import Author, Example
from ..data.examples import Examples
from ..data.formats import Row
from ..rollout import Rollout
from ..step import Step

_OPENING = b'{"seed": '  # of every line


@dataclass(frozen=True)
class Answer:
    """One answer: its ids beside its prompt's, and what a reader of the file sees."""

    example: Example
    line: dict[str, Any]  # seed, row, prompt, answer, references, correct, truncated, tokens, id


@dataclass(frozen=True)
class Written:
    """Every answer, seed after seed in the order of the rows, and what those written just now took."""

    answers: list[Answer]
    tokens: int
    seconds: float


class Pace:
    """How many answers are written at once: twice as many as before, as long as that makes more tokens per second."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._growing = True
        self._fastest = (0.0, size)  # tokens per second, and with which size

    def note(self, count: int, tokens: int, seconds: float) -> None:
        """Learn from `count` answers written at once; fewer than asked for (the last ones) say nothing."""
        if self._growing and count >= self.size:
            speed = tokens / max(seconds, 1e-9)
            self._growing = speed > 1.1 * self._fastest[0]
            if self._growing:
                self._fastest = (speed, self.size)
                self.size *= 2
            else:
                self.size = self._fastest[1]

    def shrink(self) -> None:
        """Memory was too small."""
        self.size, self._growing = self.size // 2, False


def write_answers(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    rollout: Rollout,
    seeds: Sequence[int],
    judge: Callable[[str, Row], bool | None],
    *,
    author: Author = "student",
    path: Path | None = None,
    pace: Pace | None = None,
    made: Callable[[int], None] = lambda count: None,
) -> Written:
    """Let `model` answer every prompt by `rollout`, once for each seed; longest prompts first, alike ones together.

    Args:
        judge: says whether a text is a right answer to a row, or None where that is unknown; kept with the answer.
        path: a JSONL file that keeps the answers. Those it has already are not written again.
        pace: finds out how many answers to write at once; without it the rollout's own `batch_size` stays.
        made: told how many more answers there are, those found in the file first.

    Raises:
        ValueError: for a rollout that gives several responses a prompt, for a file with answers of something else, and
            for one that another process is adding to.
    """
    if getattr(rollout, "responses", 1) != 1:
        raise ValueError(
            "several answers to a prompt are asked for by several seeds: leave the rollout's responses at 1"
        )
    rollout.follow(model, tokenizer, author)
    prompts = [replace(example, row=row) for row, example in enumerate(examples.examples)]
    book = _Book(path, {} if path is None else identity(model, rollout, author), examples.rows, judge)
    tokens, seconds = 0, 0.0
    asked = [replace(prompt, author=author) for prompt in prompts]
    if path is not None and path.is_file() and not _lock_of(path).exists():
        book.check(seeds, asked)  # before a lock is put beside a file that may be somebody else's
    with _alone(path):
        book.take_up(seeds, asked)
        made(len(book.answers))
        for seed in seeds:
            missing = [prompt for prompt in prompts if (seed, prompt.row) not in book.answers]
            missing.sort(key=lambda prompt: len(prompt.prompt), reverse=True)
            while missing:
                start = time.perf_counter()
                written = _first(missing, rollout, pace, Step(0, seed))
                tokens += sum(len(example.response) for example in written)
                seconds += time.perf_counter() - start
                texts = tokenizer.batch_decode([example.response for example in written], skip_special_tokens=True)
                book.keep(seed, written, texts)
                made(len(written))
                del missing[: len(written)]
    return Written([book.answers[seed, e.row] for seed in seeds for e in prompts], tokens, seconds)


def identity(model: Any, rollout: Rollout, author: Author) -> dict[str, Any]:
    """What an answer depends on, beside its seed and its prompt: whose weights, and how they are sampled from."""
    settings = {name: value for name, value in vars(rollout).items() if name[0] != "_" and name != "batch_size"}
    return {"author": author, "weights": fingerprint(model), "rollout": type(rollout).__name__, **settings}


def fingerprint(model: Any) -> str:
    """16 hexadecimal digits that change with a model's weights, of which up to 1024 of each tensor are looked at."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 1024)][:1024].double().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _first(prompts: Sequence[Example], rollout: Rollout, pace: Pace | None, step: Step) -> list[Example]:
    """Answers to the first of `prompts`, to as many as the pace says and memory holds."""
    while True:
        count = _set_batch(rollout, pace, len(prompts))
        start = time.perf_counter()
        try:
            written = rollout.generate(prompts[:count], step)
        except torch.OutOfMemoryError:
            if pace is None or pace.size == 1:
                raise
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            pace.shrink()
            continue
        if pace is not None:
            pace.note(len(written), sum(len(example.response) for example in written), time.perf_counter() - start)
        return written


def _set_batch(rollout: Rollout, pace: Pace | None, missing: int) -> int:
    """How many prompts to hand over next. A rollout that has no batch size of its own gets all, but for a pace."""
    if pace is None:
        return getattr(rollout, "batch_size", missing)
    if hasattr(rollout, "batch_size"):
        rollout.batch_size = pace.size  # type: ignore[attr-defined]
    return pace.size


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Keep every other process from adding to the file; the lock of a process that was killed is free again."""
    if path is None:
        yield
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file for the answers, such as {path / 'answers.jsonl'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if _lock_of(path).exists() and _lock_of(path).stat().st_size:
        raise ValueError(f"{_lock_of(path)} is no lock, which would be empty: give another file for the answers")
    lock = FileLock(_lock_of(path), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is writing answers to {path}: let it end, or give another file") from None
    try:
        yield
    finally:
        lock.release()


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


class _Book:
    """The answers there are, in memory and in a file."""

    def __init__(
        self, path: Path | None, author: dict[str, Any], rows: Sequence[Row], judge: Callable[[str, Row], bool | None]
    ) -> None:
        self.path, self.rows, self.judge = path, rows, judge
        self.author = json.dumps(author, sort_keys=True, default=str)
        self.answers: dict[tuple[int, int], Answer] = {}

    def keep(self, seed: int, written: Sequence[Example], texts: Sequence[str]) -> None:
        """Remember answers, and add them to the file."""
        answers = [self._answer(seed, example, text) for example, text in zip(written, texts, strict=True)]
        self.answers |= {(seed, answer.example.row): answer for answer in answers}
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(a.line, ensure_ascii=False) + "\n" for a in answers).encode())

    def take_up(self, seeds: Sequence[int], prompts: Sequence[Example]) -> None:
        """Remember what the file has for these seeds and prompts, and cut off what a killed process left of a line."""
        if self.path is None or not self.path.exists():
            return
        whole = self.check(seeds, prompts)
        if whole < self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.truncate(whole)

    def check(self, seeds: Sequence[int], prompts: Sequence[Example]) -> int:
        """Change nothing, refuse a file with anything but answers, and return how many bytes its whole lines have.

        A last line without its end is a part of an answer only behind answers, and where it begins as one; an earlier
        evaluation may have asked for more seeds and prompts than this one.
        """
        if self.path is None or not self.path.exists():
            return 0
        remedy = "give another file for the answers, or delete this one to have them written anew"
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines, torn = content[:whole].splitlines(), content[whole:]
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                seed, row, key, answer = int(line["seed"]), int(line["row"]), line["id"], str(line["answer"])
                response, truncated = [int(token) for token in line["tokens"]], bool(line["truncated"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}:{number} is no answer that was kept here: {remedy}") from None
            if seed not in seeds or row not in range(len(prompts)):
                continue
            if key != self._id(seed, prompts[row]):
                kind = "another model's, to another prompt or sampled otherwise"
                raise ValueError(f"{self.path}:{number} is an answer of {kind}: {remedy}")
            example = replace(prompts[row], response=response, truncated=truncated)
            self.answers[seed, row] = self._answer(seed, example, answer)
        if torn and not (lines and (torn.startswith(_OPENING) or _OPENING.startswith(torn))):
            raise ValueError(f"{self.path}:{len(lines) + 1} is no answer that was kept here: {remedy}")
        return whole

    def _answer(self, seed: int, example: Example, text: str) -> Answer:
        row = self.rows[example.row]
        line = {
            "seed": seed,
            "row": example.row,
            "prompt": row.prompt,
            "answer": text,
            "references": list(row.references),
            "correct": self.judge(text, row),
            "truncated": example.truncated,
            "tokens": example.response,
            "id": self._id(seed, example),
        }
        return Answer(example, line)

    def _id(self, seed: int, prompt: Example) -> str:
        return hashlib.sha256(f"{self.author}{seed} {prompt.row} {prompt.prompt}".encode()).hexdigest()[:16]
