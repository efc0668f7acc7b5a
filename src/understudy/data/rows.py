"""Read dataset rows from files, folders and the Hugging Face hub, as dictionaries of columns.

Every row has its place ("my.jsonl:17"), so that later errors about its columns or tokens name file and line. A line
that is not a row is yielded as a `BadRow`; the caller decides whether to stop or to skip it.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..registry import did_you_mean

END_OF_TEXT = "<|endoftext|>"  # separates the documents of a .txt file
SPLITS = {"train", "validation", "valid", "val", "dev", "test"}  # file names that name a split


class DataError(ValueError):
    """An error in a dataset, in one sentence with the remedy."""


class BadRow(DataError):
    """An error in one row, which may be skipped."""


class SourceRow(NamedTuple):
    """A row's columns and its place: file and line."""

    where: str
    columns: dict[str, Any]


def read_rows(dataset: str | Path, split: str = "train", name: str | None = None) -> Iterator[SourceRow | BadRow]:
    """Read the rows of a file, of a folder's files in the order of their names, or of a dataset of the hub.

    Files are .jsonl, .json, .csv and .txt (also followed by .gz), and .parquet. A .txt file's rows are its documents,
    in the column `text`. If a folder's files are named after splits (train.jsonl, test-00000-of-00002.parquet), only
    those of `split` are read; a single file is read whatever its name. `name` is the hub's configuration name.

    Raises:
        DataError: if the dataset is missing, a file cannot be read, or a folder has no such files.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        for file in _files(path, split):
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif _looks_like_a_path(str(dataset)):
        nearby = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f'there is no file or folder "{dataset}"{did_you_mean(path.name, nearby)}')
    else:
        yield from _read_hub(str(dataset), split, name)


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _looks_like_a_path(dataset: str) -> bool:
    # A hub id is "name" or "owner/name", without the ending of a data file.
    path_like = dataset.startswith(("/", ".", "~")) or dataset.endswith("/")
    return path_like or "\\" in dataset or dataset.count("/") > 1 or _kind(Path(dataset)) in {*READERS, ".gz"}


def _files(folder: Path, split: str) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if _kind(file) in READERS and not file.name.startswith(".")]
    if not files:
        kinds = ", ".join(READERS)
        raise DataError(f'the folder "{folder}" has no data files ({kinds}); subfolders are not searched')
    splits = {file: file.name.split(".")[0].split("-")[0] for file in files}
    if SPLITS.isdisjoint(splits.values()):
        return files
    files_of_split = [file for file in files if splits[file] == split]
    if not files_of_split:
        names = ", ".join(sorted(SPLITS.intersection(splits.values())))
        raise DataError(f'the folder "{folder}" has files of the splits {names}, and none of the split {split}')
    return files_of_split


def _read_file(path: Path) -> Iterator[SourceRow | BadRow]:
    if _kind(path) not in READERS:
        raise DataError(f'"{path}" is not a supported kind of file; use one of {", ".join(READERS)}')
    try:
        yield from READERS[_kind(path)](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'"{path}" cannot be read: {error}') from error


def _open(path: Path) -> TextIO:
    # Bytes that are not UTF-8 become lone surrogates, so that only the rows that contain them are bad.
    raw = gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_json_lines(path: Path) -> Iterator[SourceRow | BadRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _row(f"{path}:{number}", json.loads(line))
            except json.JSONDecodeError as error:
                yield BadRow(f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}")


def _read_json(path: Path) -> Iterator[SourceRow | BadRow]:
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):  # some .json files are JSON lines
        yield from _read_json_lines(path)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from error
    for number, item in enumerate(items, 1):
        yield _row(f"{path}, item {number}", item)


def _row(where: str, value: Any) -> SourceRow | BadRow:
    if isinstance(value, dict):
        return SourceRow(where, value)
    return BadRow(f'{where}: a row is an object such as {{"prompt": ..., "completion": ...}}, not {describe(value)}')


def describe(value: Any) -> str:
    """A value in an error message: its JSON type, and the value cut to 40 characters."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    text = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
    return f"{names.get(type(value), type(value).__name__)} ({text})"


def check_text(where: str, name: str, value: Any) -> str:
    """The value, if it is a string with more than white space in it.

    Raises:
        BadRow: naming the row and the column if it is not, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise BadRow(f'{where}: the "{name}" is {describe(value)}, not a string')
    if not value.strip():
        raise BadRow(f'{where}: the "{name}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f'{where}: the "{name}" is not valid UTF-8 after {value[: error.start][-20:]!r}') from error
    return value


def _read_csv(path: Path) -> Iterator[SourceRow | BadRow]:
    with _open(path) as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not valid CSV: {error}") from error
        while header is not None:
            number = reader.line_num + 1  # a quoted field may span several lines: name the first
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield BadRow(f"{path}:{number}: not valid CSV: {error}")
                continue
            if fields is None:
                return
            if len(fields) == len(header):
                yield SourceRow(f"{path}:{number}", dict(zip(header, fields, strict=True)))
            elif fields:  # blank lines are ignored
                yield BadRow(f"{path}:{number}: has {len(fields)} fields where the header has {len(header)}")


def _read_text(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        text = file.read().replace("\r\n", "\n")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        number = text.count("\n", 0, error.start) + 1
        raise DataError(f"{path}:{number}: not valid UTF-8; save the file with that encoding") from error
    number = 1
    for document in text.split(END_OF_TEXT):
        if document.strip():
            indent = len(document) - len(document.lstrip())
            yield SourceRow(f"{path}:{number + document.count(chr(10), 0, indent)}", {"text": document})
        number += document.count("\n")


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for columns in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path}, row {number}", columns)
    except pyarrow.ArrowException as error:
        raise DataError(f'"{path}" cannot be read as Parquet: {error}') from error


READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _read_hub(dataset: str, split: str, name: str | None) -> Iterator[SourceRow]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        table = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:
        if isinstance(error, DatasetNotFoundError):
            reason = "the Hugging Face hub has no such dataset, or shows it only after a login"
        elif isinstance(error, ConnectionError):
            reason = "the Hugging Face hub could not be reached to look for such a dataset"
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            reason = f"the hub's dataset of that name could not be loaded: {message}"
        raise DataError(f'there is no file or folder "{dataset}", and {reason}') from error
    for number, columns in enumerate(table, 1):
        yield SourceRow(f"{dataset} ({split}), row {number}", dict(columns))
