"""Malformed data files by a seeded generator: each is read, or is one sentence; nothing hangs and no good row is lost.

The environment variable FUZZ is the number of files; `make fuzz` tries many more than the tests do.
"""

import csv
import gzip
import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest
from rows_of_text import CHATML, byte_level

from understudy.data.examples import DataError, Examples, load_examples

COUNT = int(os.environ.get("FUZZ", "40"))
SECONDS = 10  # for one file
DIGITS = "<digits>"  # a number of thousands of digits, which json.dumps does not write
DEEP = "<deep>"  # a list of a hundred thousand levels

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS = [
    {"prompt": "Two plus two?", "completion": " four"},
    {"prompt": "Who?", "response": "me", "image": None},
    {"question": "Why?", "answer": "So.", "n": 3},
    {"instruction": "Add", "input": "2, 2", "output": "4"},
    {"messages": [USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
    {"prompt": [USER], "completion": [{**ASSISTANT, "reasoning_content": "Hm."}]},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [CALL]},
    {"text": "The star learns.\nThe part is long."},
]
VALUES = [
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "a", "\x00", "\x1b[31mred", "\u202e", "{}"),
    *("\ud800", "a" * 50_000, "\n", '"', "[]", "[1]", "<|im_end|>", DIGITS, DEEP),
    *([], {}, [[]], [None], [""], ["a", 1], {"a": {"b": None}}, [{}], [{"role": "x"}]),
    *([USER, USER], [ASSISTANT], [USER, None], [{**USER, "content": [{"type": "image"}]}]),
]
COLUMNS = list(dict.fromkeys(column for row in ROWS for column in row))
COLUMNS += ["system", "context", "\x1b[31m", "", "a.b", "prompt ", "Prompt"]
OPTIONS = [
    {},
    {"columns": {"prompt": "question"}},
    {"template": "{prompt}!"},
    {"template": "chat"},
    {"train_on": "all"},
]


def mutated_row(row: dict, random: random.Random) -> dict:
    """The row with a value, a key or a nested value replaced, added or removed."""
    row = json.loads(json.dumps(row))
    name, value = random.choice(list(row)), random.choice(VALUES)
    kind = random.randrange(5)
    if kind == 0:
        del row[name]
    elif kind == 1:
        row[random.choice(COLUMNS)] = row.pop(name)
    elif kind == 2:
        row[random.choice(COLUMNS)] = value
    elif isinstance(row[name], list) and kind == 3:
        message = random.choice(row[name])
        message[random.choice([*message, "tool_calls", "weight"])] = value
    else:
        row[name] = value
    return row


def as_json(value: object, random: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    text = text.replace(f'"{DIGITS}"', "7" * 5000).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", "surrogatepass")


def as_csv(rows: list[dict], random: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, quoting=random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow(names)
    for row in rows:
        fields = [str(row.get(name, "")) for name in names]
        writer.writerow(fields if random.random() < 0.8 else random.choice([fields[:-1], [*fields, "x"], []]))
    return file.getvalue().encode("utf-8", "surrogatepass")


def mutated_bytes(content: bytes, random: random.Random) -> bytes:
    """The content cut, doubled, damaged at a few places, or in another encoding."""
    place, other = sorted(random.randrange(len(content) + 1) for _ in range(2))
    damage = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
    text = content.decode("utf-8", "replace")
    return random.choice(
        [
            content[:place],
            content[:place] + content[other:],
            content[:place] + damage + content[place:],
            content[:place] + damage + content[place + len(damage) :],
            content[:other] + content[place:],
            content.replace(b"\n", random.choice([b"\r", b"\r\n", b"\n\n", b"\x00", b"\xe2\x80\xa8"])),
            content.replace(b'"', random.choice([b"'", b'""', b"", b'\\"'])),
            text.encode(random.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])),
            b"",
            bytes(200),
        ]
    )


def write_file(folder: Path, random: random.Random) -> tuple[Path, int | None]:
    """A malformed file or folder, and the number of its rows, if each is to be an example or to be skipped."""
    kind = random.choice(["jsonl", "jsonl", "json", "csv", "txt", "parquet", "saved"])
    rows = [random.choice(ROWS) for _ in range(6)]
    rows = [mutated_row(row, random) if random.random() < 0.6 else row for row in rows]
    path = folder / f"data.{kind}"
    if kind == "parquet":
        parquet.write_table(table(random.choice(ROWS), random), path)
    elif kind == "saved":
        datasets.Dataset(table(random.choice(ROWS), random)).save_to_disk(str(path))
    elif kind == "jsonl":
        path.write_bytes(b"\n".join(as_json(row, random) for row in rows))
    elif kind == "json":
        path.write_bytes(b"[" + b", ".join(as_json(row, random) for row in rows) + b"]")
    elif kind == "csv":
        path.write_bytes(as_csv(rows, random))
    else:
        path.write_bytes(str(random.choice(VALUES)).encode("utf-8", "surrogatepass"))
    count = None if kind == "txt" or any("text" in row for row in rows) else len(rows) if "json" in kind else None
    if random.random() < 0.5:
        damaged = path if path.is_file() else random.choice(sorted(path.iterdir()))
        damaged.write_bytes(mutated_bytes(damaged.read_bytes(), random))
        count = None
    if path.is_file() and kind != "parquet" and random.random() < 0.2:
        path.write_bytes(gzip.compress(path.read_bytes()))
        path = path.rename(folder / f"data.{kind}.gz")
    return path, count


def table(row: dict, random: random.Random) -> pyarrow.Table:
    """A table of rows of one kind, in which up to two columns have odd values."""
    odd = [
        pyarrow.array([2**52, -(2**52), 0, None], pyarrow.timestamp(random.choice(["s", "ms", "us", "ns"]))),
        pyarrow.array([2**30, -(2**30), 0, 1], pyarrow.date32()),
        pyarrow.array([2**62, 0, 1, None], pyarrow.duration("s")),
        pyarrow.array([b"\xff", b"", b"a", None]),
        pyarrow.array([1, 2.5, float("nan"), None]),
        pyarrow.array([["a"], [], None, [None]]),
        pyarrow.array([None] * 4),
    ]
    columns = {name: pyarrow.array([value] * 4) for name, value in row.items()}
    return pyarrow.table(columns | {random.choice(COLUMNS): random.choice(odd) for _ in range(random.randrange(3))})


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise AssertionError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    remaining = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.alarm(remaining)


def outcome(load: Callable[[], Examples]) -> Examples | str:
    """The examples, or the sentence of the error."""
    try:
        with no_longer_than(SECONDS):
            return load()
    except DataError as error:
        message = str(error)
        assert message.isprintable()
        assert 10 < len(message) < 1100
        return message


@pytest.mark.parametrize("start", range(0, COUNT, 20))
def test_a_malformed_file_is_read_or_explained(start, tmp_path):
    tokenizers = [byte_level(), byte_level(chat=CHATML)]
    for seed in range(start, min(start + 20, COUNT)):
        generator = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        path, count = write_file(folder, generator)
        content = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        options = {**generator.choice(OPTIONS), "max_length": 60, "text_prompt": 4}
        tokenizer = generator.choice(tokenizers)
        try:
            strict = outcome(partial(load_examples, path, tokenizer, **options))
            loaded = outcome(partial(load_examples, path, tokenizer, on_bad_row="skip", **options))
        except Exception as error:
            raise AssertionError(
                f"FUZZ seed {seed}, {path.name}, {options}: {type(error).__name__}: {error}"
            ) from error
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == content
        if isinstance(strict, Examples):
            assert isinstance(loaded, Examples)
            assert (strict.fingerprint, loaded.skipped - strict.skipped) == (loaded.fingerprint, 0)
        if count is not None and isinstance(loaded, Examples):
            assert len(loaded) + loaded.skipped == count, f"seed {seed}: rows are lost"
