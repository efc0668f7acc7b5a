"""Files that survive a kill: text written whole or not at all, and JSON lines whose torn last line never matters.

A process that is killed while it appends leaves the beginning of a line without its end. Such a torn line is never
read, and never joined with what is appended next. Lines end at "\\n" alone: a JSON string may hold U+2028 or U+0085,
at which `str.splitlines` would cut it in two.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whole or not at all: under another name first, then moved into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The complete lines of a file without their ends, and what comes behind the last end: a torn line, or nothing."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, in order; empty if there is no such file.

    What is no JSON object is left out: a torn line, and anything else that somebody may have written there.
    """
    if not path.is_file():
        return []
    values = []
    lines, torn = split_lines(path.read_bytes())
    for line in (*lines, torn):
        try:
            value = json.loads(line)
        except ValueError:  # also bytes that are no UTF-8
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def write_jsonl(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file whole or not at all."""
    write_atomic(path, "".join(map(_line, values)))


def append_jsonl(path: Path, *values: dict[str, Any]) -> None:
    """Append objects to a JSONL file, made where there is none, in one write that no other process comes between.

    A torn line at the end of the file is ended first, so that it stays alone.
    """
    lines = "".join(map(_line, values)).encode()
    with path.open("ab", buffering=0) as file:
        file.write(b"\n" + lines if ends_in_torn_line(path) else lines)


def ends_in_torn_line(path: Path) -> bool:
    """Does a file end without the end of a line, as a killed process leaves it?"""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
