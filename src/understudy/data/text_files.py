"""Read rows from JSON lines, JSON, CSV and text files, which may be compressed by gzip.

A file is read as UTF-8. Bytes that are not become lone surrogates, so that only the rows that contain them are bad.
Sizes are bounded, so that a file of a few bytes that unpacks to many gigabytes is an error.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BadRow, DataError, SourceRow, describe

END_OF_TEXT = "<|endoftext|>"  # separates the documents of a .txt file
LONGEST_LINE = 2**27  # characters of a line, and of a CSV field
LONGEST_FILE = 2**30  # characters of a file that is read as a whole


def _open(path: Path) -> io.TextIOWrapper:
    file = gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
    beginning = file.peek(4096)[:4096]
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    if b"\0" in beginning:
        raise DataError(f"{path} has NUL bytes, so it is no UTF-8 text; save it with that encoding")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(path: Path, longest: int) -> Iterator[tuple[int, str]]:
    """The numbers and texts of the lines."""
    with _open(path) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise DataError(f"{path}:{number}: the line has more than {longest:,} characters")
            yield number, line


def _whole(path: Path) -> str:
    with _open(path) as file:
        text = file.read(LONGEST_FILE + 1)
    if len(text) > LONGEST_FILE:
        raise DataError(f"{path} has more than {LONGEST_FILE:,} characters; split it into several files")
    return text


def read_json_lines(path: Path) -> Iterator[SourceRow | BadRow]:
    """One JSON object per line; blank lines are ignored."""
    for number, line in _lines(path, LONGEST_LINE):
        if line.strip():
            try:
                yield _row(f"{path}:{number}", load_json(line))
            except json.JSONDecodeError as error:
                yield BadRow(f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}")
            except ValueError as error:
                yield BadRow(f"{path}:{number}: not valid JSON: {error}")


def read_json(path: Path) -> Iterator[SourceRow | BadRow]:
    """A list of JSON objects, or one object per line."""
    text = _whole(path).strip()
    try:
        items = load_json(text) if text.startswith(("[", "{")) else []
    except ValueError as error:
        if text.startswith("{"):
            yield from read_json_lines(path)
            return
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
        raise DataError(f"{path}{place}: not valid JSON{reason}") from error
    if isinstance(items, dict) and "\n" in text:
        raise DataError(f"{path} is one object over several lines; a file holds a list of objects, or one on each line")
    if not text.startswith("["):
        yield from read_json_lines(path)
        return
    for number, item in enumerate(items, 1):
        yield _row(f"{path}, item {number}", item)


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for what is no JSON, a key that an object has twice, numbers of thousands of digits, and values that
            are nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise (ValueError("a number has thousands of digits") if "digits" in str(error) else error) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'an object has the key "{next(x for x in names if names.count(x) > 1)}" twice')
    return columns


def _row(where: str, value: Any) -> SourceRow | BadRow:
    if isinstance(value, dict):
        return SourceRow(where, value)
    return BadRow(f'{where}: a row is an object such as {{"prompt": ..., "completion": ...}}, not {describe(value)}')


def read_csv(path: Path) -> Iterator[SourceRow | BadRow]:
    """A table with a header line; blank lines are ignored."""
    csv.field_size_limit(LONGEST_LINE)
    # Quotes are read strictly, because after one that is out of place nobody knows where the next row begins.
    reader = csv.reader((line for _, line in _lines(path, LONGEST_LINE)), strict=True)
    header = None
    while True:
        number = reader.line_num + 1  # a quoted field may span several lines: name the first
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = f"not valid CSV: {error}; a field with quotes, commas or line ends in it stands in quotes"
            raise DataError(f"{path}:{number}: {reason}, and quotes in it are written twice") from error
        if fields is None:
            return
        if header is None:
            header = fields
            if len(set(header)) < len(header):
                name = next(x for x in header if header.count(x) > 1)
                raise DataError(f'{path}:{number}: the header has the column "{name}" twice; rename one')
        elif len(fields) == len(header):
            yield SourceRow(f"{path}:{number}", dict(zip(header, fields, strict=True)))
        elif fields:
            yield BadRow(f"{path}:{number}: has {len(fields)} fields where the header has {len(header)}")


def read_text(path: Path, text_as: str = "chunks") -> Iterator[SourceRow | BadRow]:
    """Documents of running text, separated by `<|endoftext|>`, or prompts: each line, or the file as a whole."""
    if text_as == "lines":
        for number, line in _lines(path, LONGEST_LINE):
            if line.strip():
                yield SourceRow(f"{path}:{number}", {"prompt": line.rstrip("\r\n")})
        return
    text = _whole(path).replace("\r\n", "\n")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        number = text.count("\n", 0, error.start) + 1
        raise DataError(f"{path}:{number}: not valid UTF-8; save the file with that encoding") from error
    if text_as == "files":
        yield SourceRow(str(path), {"prompt": text.removesuffix("\n")})
        return
    number = 1
    for document in text.split(END_OF_TEXT):
        if document.strip():
            indent = len(document) - len(document.lstrip())
            yield SourceRow(f"{path}:{number + document.count(chr(10), 0, indent)}", {"text": document})
        number += document.count("\n")
