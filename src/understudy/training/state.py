"""The distillation state in a checkpoint: the method's state, and the tokens and seconds that the run has spent."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..method import Method
from .spending import Spending

STATE_FILE = "distillation.safetensors"


def save_state(folder: Path, method: Method, spending: Spending) -> None:
    """Save the method's state and the run's spending."""
    state = {f"method.{name}": tensor.contiguous() for name, tensor in method.state_dict().items()}
    state["spent"] = torch.tensor(spending.state(), dtype=torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / STATE_FILE)


def load_state(folder: Path, method: Method, spending: Spending) -> None:
    """Restore what `save_state` saved."""
    state = load_file(folder / STATE_FILE)
    spending.resume(state.pop("spent").tolist())
    method.load_state_dict({name.removeprefix("method."): tensor for name, tensor in state.items()})
