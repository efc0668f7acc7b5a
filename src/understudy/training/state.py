"""The distillation state in a checkpoint: of method and teacher, what was spent, and responses generated ahead."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ..method import Method
from ..teacher import Teacher
from . import checkpoint
from .collecting import Collector
from .spending import Spending

STATE_FILE = "distillation.safetensors"


def save_state(
    folder: Path, parts: Mapping[str, Method | Teacher], spending: Spending, collector: Collector, writes: bool
) -> None:
    """Save the first files of a checkpoint, in the process that `writes`.

    These are the parts' state, the run's spending and the responses that were generated ahead.
    """
    if writes:
        checkpoint.begin(folder)
        state = {
            f"{key}.{name}": tensor.contiguous()
            for key, part in parts.items()
            for name, tensor in part.state_dict().items()
        }
        state["spent"] = torch.tensor(spending.state(), dtype=torch.float64)
        save_file(state, folder / STATE_FILE)
    collector.save(folder, writes)
    PartialState().wait_for_everyone()  # before the others add their files


def load_state(folder: Path, parts: Mapping[str, Method | Teacher], spending: Spending) -> None:
    """Restore what `save_state` saved, except the collector's responses.

    Raises:
        ValueError: for a checkpoint of another program.
    """
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} is no checkpoint of understudy ({STATE_FILE} is missing): choose another checkpoint"
        )
    state = load_file(folder / STATE_FILE)
    spending.resume(state.pop("spent").tolist())
    for key, part in parts.items():
        own = {name.removeprefix(f"{key}."): x for name, x in state.items() if name.startswith(f"{key}.")}
        part.load_state_dict(own)
