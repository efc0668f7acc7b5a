"""Atomic text files, and JSONL files whose torn last line is ignored.

A process that is killed while it appends leaves a torn line: the beginning of a line without its end. It is never
read, and never joined with what is appended next. Lines end at "\\n" alone: a JSON string may hold U+2028 or U+0085,
at which `str.splitlines` would cut it in two.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: under another name first, then moved into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The complete lines of a file without their ends, and the rest after the last end: a torn line, or nothing."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, in order; empty if there is no such file.

    Lines that are not JSON objects are left out, such as a torn line.
    """
    if not path.is_file():
        return []
    values = []
    lines, torn = split_lines(path.read_bytes())
    for line in (*lines, torn):
        try:
            value = json.loads(line)
        except ValueError:  # also for bytes that are not UTF-8
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def write_jsonl(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    write_atomic(path, "".join(map(_line, values)))


def append_jsonl(path: Path, *values: dict[str, Any]) -> None:
    """Append objects to a JSONL file, created if missing, in one write, so that lines of processes do not interleave.

    After a torn line a newline comes first, so that nothing is joined with it.
    """
    lines = "".join(map(_line, values)).encode()
    with path.open("ab", buffering=0) as file:
        file.write(b"\n" + lines if ends_in_torn_line(path) else lines)


def ends_in_torn_line(path: Path) -> bool:
    """Does a file end without a newline, as a killed process leaves it?"""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
