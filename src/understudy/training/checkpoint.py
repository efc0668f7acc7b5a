"""The checkpoints in a run's folder, checkpoint-<step>/, and which of them is the last complete one."""

import json
from pathlib import Path

PATTERN = "checkpoint-[0-9]*"  # as transformers.Trainer names them


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written completely: a killed run may leave a part of one.

    The trainer's state is the last file of a checkpoint to be written.
    """
    checkpoints = {int(step): path for path in Path(folder).glob(PATTERN) if (step := path.name[11:]).isdigit()}
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None
