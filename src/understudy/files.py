"""Files that are complete or not there, and JSONL files whose torn last line is ignored.

A file or folder is written under another name, flushed to the disk and then moved into place, so that neither a killed
process nor a power cut leaves half of it.

A process that is killed while it appends leaves a torn line: the beginning of a line without its end. It is never
read, and never joined with what is appended next. Lines end at "\\n" alone: a JSON string may hold U+2028 or U+0085,
at which `str.splitlines` would cut it in two.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BLOCK, _BLOCKS = 1 << 16, 32


def write_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: under another name first, then moved into place."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Move a folder that is complete into the place of another one."""
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    remove(folder)
    partial.rename(folder)
    sync(folder.parent)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; some file systems and Windows cannot do this for folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """A hash of a file's size and of 32 of its 64-kB blocks, which are all blocks up to 2 MB: 16 hexadecimal digits."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    blocks = -(-size // _BLOCK)
    with path.open("rb") as file:
        for index in range(min(blocks, _BLOCKS)):
            file.seek(_BLOCK * (index * (blocks - 1) // max(min(blocks, _BLOCKS) - 1, 1)))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


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
        except (ValueError, RecursionError):  # also for bytes that are not UTF-8
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
        content = b"\n" + lines if ends_in_torn_line(path) else lines
        while content:  # one write, unless the disk is full
            content = content[file.write(content) :]


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
