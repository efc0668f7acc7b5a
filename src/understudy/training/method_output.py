"""Checks of what a method returns: a loss that can be trained on, and metrics with names of their own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..method import Method
from ..scores import DIVERGENCE_METRICS, SHARED_BOUNDARIES
from . import router_loss

_LOGGED = {"loss", "grad_norm", "learning_rate", "epoch", "step", "tokens", "tokens_per_second", "response_length"}
_RESERVED = _LOGGED | {"truncated", router_loss.NAME, *DIVERGENCE_METRICS, SHARED_BOUNDARIES}
_PREFIXES = ("eval_", "train_", "seconds_")


def checked_loss(values: Any, method: Method) -> Tensor:
    """The values that the method's `loss` returned.

    Raises:
        ValueError: if they are no tensor, or do not depend on the student while it is trained.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"{type(method).__name__}.loss should return a tensor, not {type(values).__name__}")
    if torch.is_grad_enabled() and not values.requires_grad:
        raise ValueError(
            f"{type(method).__name__}.loss returned values without a gradient: compute them from `student`"
        )
    return values


def checked_metrics(values: Any, method: Method) -> dict[str, Tensor]:
    """The method's metrics as tensors.

    Raises:
        ValueError: for anything but a dictionary, and for a name that the trainer logs something else under.
    """
    whose = f"{type(method).__name__}.metrics"
    if not isinstance(values, Mapping):
        raise ValueError(f"{whose} should return a dictionary of tensors, not {type(values).__name__}")
    for name in values:
        if name in _RESERVED or name.startswith(_PREFIXES):
            raise ValueError(f'{whose} returns "{name}", under which the trainer logs something else: rename it')
    return {name: torch.as_tensor(value) for name, value in values.items()}
