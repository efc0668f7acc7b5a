"""Which files in a folder this package wrote: a marker file, `.understudy`, lists their kinds.

A file's name does not tell who wrote it. So files are overwritten or deleted only in a folder whose marker lists their
kind, and a folder is marked only if it has no files with the kind's names.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from ..files import remove, write_atomic
from ..training import checkpoint

MARKER = ".understudy"


@dataclass(frozen=True)
class Kind:
    """A group of files that are written together, as patterns of their names; other files are left alone."""

    name: str
    patterns: tuple[str, ...]
    nested: Mapping[str, "Kind"] = field(default_factory=dict)  # folders with a marker of their own


def kinds(folder: Path) -> list[str]:
    """The names of the kinds of files that this package wrote into a folder, as its marker says."""
    try:
        names = json.loads((folder / MARKER).read_text(encoding="utf-8"))["holds"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def foreign(folder: Path, kind: Kind) -> Path | None:
    """The first file that files of this kind would overwrite, and that this package did not write."""
    names = kinds(folder)
    if kind.name in names:
        return next(filter(_is_foreign_checkpoint, _matches(folder, *kind.patterns)), None)
    if not names and (folder / MARKER).exists():
        return folder / MARKER
    return next(_matches(folder, *kind.patterns), None)


def check(folder: Path, kind: Kind, remedy: str) -> None:
    """Refuse a folder in which files of this kind would overwrite files of the user; changes nothing.

    Raises:
        ValueError: naming the file, with the remedy.
    """
    if (path := foreign(folder, kind)) is not None:
        article = "an" if kind.name[0] in "aeiou" else "a"
        raise ValueError(f"{path} exists already and was not written by {article} {kind.name}: {remedy}")


def mark(folder: Path, kind: Kind) -> None:
    """Note in the folder's marker that it holds files of this kind, before the first of them is written."""
    names = kinds(folder)
    if kind.name not in names:
        content = {"understudy": version("understudy"), "holds": [*names, kind.name]}
        write_atomic(folder / MARKER, json.dumps(content) + "\n")


def clear(folder: Path, kind: Kind, keep: tuple[str, ...] = ()) -> None:
    """Delete the files of a kind from a folder that is marked with it; of a nested kind only that kind's files."""
    if kind.name not in kinds(folder):
        return
    for path in list(_matches(folder, *(pattern for pattern in kind.patterns if pattern not in keep))):
        if (nested := kind.nested.get(path.name)) is not None:
            if nested.name in kinds(path):
                clear(path, nested)
                if [file.name for file in path.iterdir()] == [MARKER]:
                    shutil.rmtree(path)
        elif not _is_foreign_checkpoint(path):
            remove(path)


def _is_foreign_checkpoint(path: Path) -> bool:
    """Is this a checkpoint that another program wrote, into a folder of this package?"""
    return checkpoint.step_of(path) >= 0 and not (path.is_dir() and checkpoint.is_own(path))


def _matches(folder: Path, *patterns: str) -> Iterator[Path]:
    """The paths in a folder that match the patterns, and the .partial files of killed processes."""
    for pattern in patterns:
        for path in sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.partial")]):
            if pattern != checkpoint.PATTERN or checkpoint.step_of(path) >= 0:
                yield path
