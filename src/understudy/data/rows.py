"""Read dataset rows from files, folders and the Hugging Face hub, as dictionaries of columns.

Every row has its place ("my.jsonl:17"), so that later errors about its columns or tokens name file and line. A line
that is not a row is yielded as a `BadRow`; the caller decides whether to stop or to skip it.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from ..registry import did_you_mean
from .errors import BadRow, DataError, SourceRow
from .tables import is_saved_dataset, read_hub, read_parquet, read_saved_dataset
from .text_files import read_csv, read_json, read_json_lines, read_text

SPLITS = {"train", "validation", "valid", "val", "dev", "test"}  # file names that name a split
READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
    ".parquet": read_parquet,
}

TextAs = Literal["chunks", "lines", "files"]


def read_rows(
    dataset: str | Path, split: str = "train", name: str | None = None, text_as: TextAs = "chunks"
) -> Iterator[SourceRow | BadRow]:
    """Read the rows of a file, of a folder's files in the order of their names, or of a dataset of the hub.

    Files are .jsonl, .json, .csv and .txt (also followed by .gz), and .parquet. If a folder's files are named after
    splits (train.jsonl, test-00000-of-00002.parquet), only those of `split` are read; a single file is read whatever
    its name. A folder may also be one that `datasets` saved by `save_to_disk`.

    Args:
        split: of a folder or dataset; it may be a slice, such as train[500:], train[:10%] or train+test[:50].
        name: the hub's configuration name.
        text_as: what a .txt file holds: documents of running text, in the column `text`, or prompts, one on each line
            or one for each file, in the column `prompt`.

    Raises:
        DataError: if the dataset is missing, a file cannot be read, or a folder has no such files.
    """
    if text_as not in ("chunks", "lines", "files"):
        raise DataError(f'text_as is "{text_as}", and can be chunks, lines or files')
    try:
        path = Path(dataset).expanduser()
        is_local = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, an unknown user's ~
        raise DataError(f'"{dataset}" is neither a path nor the name of a dataset: {error}') from error
    if is_local:
        yield from _sliced(path, split, text_as) if re.search(r"[\[+]", split) else _read_local(path, split, text_as)
    elif _looks_like_a_path(str(dataset)):
        nearby = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f'there is no file or folder "{dataset}"{did_you_mean(path.name, nearby)}')
    else:
        _check_text_as(text_as, str(dataset), has_text=False)
        yield from read_hub(str(dataset), split, name)


def _read_local(path: Path, split: str, text_as: TextAs) -> Iterator[SourceRow | BadRow]:
    if is_saved_dataset(path):
        _check_text_as(text_as, str(path), has_text=False)
        yield from read_saved_dataset(path, split)
        return
    files = _files(path, split) if path.is_dir() else [path]
    _check_text_as(text_as, str(path), any(_kind(file) == ".txt" for file in files))
    for file in files:
        yield from _read_file(file, text_as)


def _check_text_as(text_as: TextAs, dataset: str, has_text: bool) -> None:
    if text_as != "chunks" and not has_text:
        raise DataError(f'text_as: {text_as} is for .txt files, and "{dataset}" has none: leave it out')


def _sliced(path: Path, split: str, text_as: TextAs) -> Iterator[SourceRow | BadRow]:
    """The rows of a slice, by the rules of `datasets`: they are counted first, so all of them are read."""
    from datasets import ReadInstruction

    form = "train[500:], train[:10%] or train+test[:50]"
    try:
        instruction = ReadInstruction.from_spec(split)
    except Exception as error:
        raise DataError(f'the split "{split}" is not a name or a slice such as {form}') from error
    names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
    rows = {name: list(_read_local(path, name, text_as)) for name in names}
    try:
        parts = instruction.to_absolute({name: len(part) for name, part in rows.items()})
    except Exception as error:
        raise DataError(f'the split "{split}" of "{path}" cannot be taken: {error}') from error
    for part in parts:
        yield from rows[part.splitname][part.from_ : part.to]


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _looks_like_a_path(dataset: str) -> bool:
    # A hub id is "name" or "owner/name", without the ending of a data file.
    path_like = dataset.startswith(("/", ".", "~")) or dataset.endswith("/")
    return path_like or "\\" in dataset or dataset.count("/") > 1 or _kind(Path(dataset)) in {*READERS, ".gz"}


def _files(folder: Path, split: str) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f'the folder "{folder}" cannot be read: {error.strerror or error}') from error
    files = [file for file in entries if _kind(file) in READERS and not file.name.startswith(".")]
    if not files:
        kinds = ", ".join(READERS)
        raise DataError(f'the folder "{folder}" has no data files ({kinds}); subfolders are not searched')
    splits: Mapping[Path, str] = {file: file.name.split(".")[0].split("-")[0] for file in files}
    if SPLITS.isdisjoint(splits.values()):
        return files
    files_of_split = [file for file in files if splits[file] == split]
    if not files_of_split:
        names = ", ".join(sorted(SPLITS.intersection(splits.values())))
        raise DataError(f'the folder "{folder}" has files of the splits {names}, and none of the split {split}')
    return files_of_split


def _read_file(path: Path, text_as: TextAs) -> Iterator[SourceRow | BadRow]:
    kind = _kind(path)
    if kind not in READERS or (kind == ".parquet" and path.suffix == ".gz"):
        raise DataError(f'"{path}" is not a supported kind of file; use one of {", ".join(READERS)}')
    if not path.is_file():
        raise DataError(f'"{path}" is not a regular file, but a folder, a pipe or a device')
    try:
        yield from read_text(path, text_as) if kind == ".txt" else READERS[kind](path)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DataError(f'"{path}" cannot be read: {reason}') from error
