"""Whose files are in a folder: a mark says which kinds of files this tool wrote there.

The one idea: a name says nothing about who wrote a file. So nothing is written over or deleted in a folder unless its
file `.understudy` names that kind of files, and a folder is only marked where none of their names is taken.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

MARK = ".understudy"
_CHECKPOINT = "checkpoint-[0-9]*"

# What is written into a folder, by kind. Whatever else lies there belongs to somebody else and is left alone.
NAMES = {
    "run": (
        *("recipe.yaml", _CHECKPOINT, "student", "teacher_answers.jsonl", "soft_prompt"),
        *("metrics.jsonl", "samples.jsonl", "before.json", "run.json", "report"),
    ),
    "judgement": ("evaluation.json", "failed.txt", "log.txt"),
    "comparison": ("comparison.json", "comparison.md"),
    "report": ("report.html", "report.json", "png"),
}


def kinds(folder: Path) -> list[str]:
    """The kinds of files that this tool wrote into a folder, as its mark says."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))["holds"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [kind for kind in found if kind in NAMES] if isinstance(found, list) else []


def foreign(folder: Path, kind: str) -> Path | None:
    """The first file that writing files of this kind would replace, and that this tool did not write."""
    found = kinds(folder)
    if kind in found:
        return None
    if not found and (folder / MARK).exists():
        return folder / MARK
    return next(named(folder, *NAMES[kind]), None)


def check(folder: Path, kind: str, remedy: str) -> None:
    """Change nothing, and refuse a folder in which files of this kind would replace what this tool did not write.

    Raises:
        ValueError: naming the file, with the remedy.
    """
    if (path := foreign(folder, kind)) is not None:
        raise ValueError(f"{path} exists already and was not written by a {kind}: {remedy}")


def mark(folder: Path, kind: str) -> None:
    """Say that this tool's files of this kind are in the folder, before the first of them is."""
    found = kinds(folder)
    if kind not in found:
        line = json.dumps({"understudy": version("understudy"), "holds": [*found, kind]})
        partial = folder / f"{MARK}.{os.getpid()}.partial"
        with partial.open("x", encoding="utf-8") as file:
            file.write(line + "\n")
        partial.replace(folder / MARK)


def clear(folder: Path, kind: str, keep: tuple[str, ...] = ()) -> None:
    """Delete the files of a kind from a folder that is marked with it, and of a report in it what reports write."""
    if kind not in kinds(folder):
        return
    for path in list(named(folder, *(name for name in NAMES[kind] if name not in keep))):
        if path.name == "report":
            if "report" in kinds(path):
                clear(path, "report")
                if [file.name for file in path.iterdir()] == [MARK]:
                    shutil.rmtree(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def named(folder: Path, *patterns: str) -> Iterator[Path]:
    """What has these names in a folder, or is what a killed process left of a file that was to have such a name."""
    for pattern in patterns:
        for path in sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.partial")]):
            if pattern != _CHECKPOINT or re.fullmatch(r"checkpoint-\d+", path.name):
                yield path
