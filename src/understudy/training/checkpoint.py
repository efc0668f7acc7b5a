"""Checkpoints in a run's folder, checkpoint-<step>/, and which of them is the last complete one.

They are ordered by step, not by modification time. Only folders named checkpoint-<number> are checkpoints; a folder
such as checkpoint-best belongs to the user.
"""

import json
import re
from pathlib import Path

PATTERN = "checkpoint-[0-9]*"  # as transformers.Trainer names them


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, oldest step first."""
    by_step = {
        int(match[1]): path
        for path in Path(folder).glob(PATTERN)
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [path for _, path in sorted(by_step.items())]


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint; a killed run may leave an incomplete one.

    trainer_state.json is the last file that is written to a checkpoint.
    """
    for path in reversed(checkpoints(folder)):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None
