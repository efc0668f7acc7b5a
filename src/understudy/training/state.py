"""The distillation state in a checkpoint: the method's, what the run has spent, and responses generated ahead."""

from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ..method import Method
from . import checkpoint
from .collecting import Collector
from .spending import Spending

STATE_FILE = "distillation.safetensors"


def save_state(folder: Path, method: Method, spending: Spending, collector: Collector, writes: bool) -> None:
    """Save the first files of a checkpoint, in the process that `writes`.

    These are the method's state, the run's spending and the responses that were generated ahead.
    """
    if writes:
        checkpoint.begin(folder)
        state = {f"method.{name}": tensor.contiguous() for name, tensor in method.state_dict().items()}
        state["spent"] = torch.tensor(spending.state(), dtype=torch.float64)
        save_file(state, folder / STATE_FILE)
    collector.save(folder, writes)
    PartialState().wait_for_everyone()  # before the others add their files


def load_state(folder: Path, method: Method, spending: Spending) -> None:
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
    method.load_state_dict({name.removeprefix("method."): tensor for name, tensor in state.items()})
