"""Checkpoints in a run's folder, checkpoint-<step>/: which are complete, and which this package wrote.

A checkpoint is complete once its file `checkpoint.json` lists all its other files with their hashes; this is written
last, after the others have been flushed to the disk. Before that the file says that the checkpoint is incomplete, and
marks it as this package's own: a folder without that file belongs to somebody else, and is never changed.

Checkpoints are ordered by step, not by modification time. Only folders named checkpoint-<number> are checkpoints.
"""

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import file_digest, remove, sync, write_atomic

PATTERN = "checkpoint-[0-9]*"  # as transformers.Trainer names them
CONTENTS = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
logger = logging.getLogger(__name__)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not and by whomever, oldest step first."""
    return [path for path in sorted(Path(folder).glob(PATTERN), key=step_of) if path.is_dir() and step_of(path) >= 0]


def step_of(path: str | Path) -> int:
    """The step of a checkpoint's folder; −1 for any other name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else -1


def is_own(path: Path) -> bool:
    """Did this package write the checkpoint, or is the folder empty?"""
    return any((path / name).exists() for name in (CONTENTS, f"{CONTENTS}.partial")) or not any(path.iterdir())


def begin(path: Path) -> None:
    """Create the folder of a checkpoint, in place of one that an earlier attempt left there.

    Raises:
        ValueError: for a folder that this package did not write.
    """
    if path.is_dir():
        if not is_own(path):
            raise _foreign(path)
        discard(path)
    path.mkdir(parents=True)
    _write_contents(path, {"complete": False})


def discard(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted is still this package's own, and incomplete."""
    with suppress(OSError):  # also on a full disk
        _write_contents(path, {"complete": False})
    for file in path.iterdir():
        if file.name != CONTENTS:
            remove(file)
    remove(path)


def complete(path: Path) -> None:
    """Mark a checkpoint as complete, with all its files on the disk."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / CONTENTS)
    for file in files:
        sync(file)
    sync(path)
    digests = {file.relative_to(path).as_posix(): file_digest(file) for file in files}
    _write_contents(path, {"complete": True, "files": digests})


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, such as "optimizer.pt is missing"; None for a complete one."""
    try:
        contents = json.loads((path / CONTENTS).read_text(encoding="utf-8"))
        digests = dict(contents["files"]) if contents["complete"] else None
    except FileNotFoundError:
        return f"{CONTENTS} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{CONTENTS} cannot be read"
    if digests is None:
        return "it was not saved completely"
    for name, digest in digests.items():
        try:
            if file_digest(path / name) != digest:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def was_complete(path: Path) -> bool:
    """Was the checkpoint complete once, though it may have been damaged since?"""
    try:
        return bool(json.loads((path / CONTENTS).read_text(encoding="utf-8"))["complete"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint; a killed run may leave an incomplete one."""
    for path in reversed(checkpoints(folder)):
        if is_own(path) and damage(path) is None:
            return str(path)
    return None


def damaged(folder: str | Path) -> list[tuple[Path, str]]:
    """The checkpoints that are newer than the last complete one, newest first, and what is wrong with each."""
    last = last_checkpoint(folder)
    newer = [path for path in reversed(checkpoints(folder)) if last is None or step_of(path) > step_of(last)]
    return [(path, damage(path) or "") for path in newer if is_own(path) and any(path.iterdir())]


def check_none_overwritten(folder: str | Path, first: int, last: int) -> None:
    """Refuse to train where a checkpoint of the steps `first` to `last` would overwrite somebody else's.

    Raises:
        ValueError: naming the folder.
    """
    for path in checkpoints(folder):
        if first <= step_of(path) <= last and not is_own(path):
            raise _foreign(path)


def _write_contents(path: Path, contents: dict[str, Any]) -> None:
    write_atomic(path / CONTENTS, json.dumps(contents, indent=1))


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path} exists already and is no checkpoint of understudy: give another output_dir, or move that folder"
    )
