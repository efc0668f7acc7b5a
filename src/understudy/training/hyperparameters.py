"""A checkpoint's optimizer and schedule with the hyperparameters that are given now, such as a lower learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("betas", "eps", "weight_decay", "momentum", "nesterov", "alpha")  # the rest of a group is state


@contextmanager
def given_hyperparameters(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Keep the optimizer's hyperparameters and base learning rates, while a checkpoint's state is loaded in this block.

    PyTorch's checkpoints contain both, so that a changed learning rate would have no effect. Where nothing has changed,
    everything is as it was loaded.
    """
    given = [{name: group[name] for name in _NAMES if name in group} for group in optimizer.param_groups]
    rates = list(getattr(scheduler, "base_lrs", ()))
    yield
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)
    loaded_rates = list(getattr(scheduler, "base_lrs", ()))
    if rates == loaded_rates or len(rates) != len(optimizer.param_groups):
        return
    for group, rate, loaded in zip(optimizer.param_groups, rates, loaded_rates, strict=True):
        group["initial_lr"] = rate
        group["lr"] = group["lr"] * rate / loaded if loaded else rate
    scheduler.base_lrs = rates
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def remedy(folder: str, unbounded: bool = False) -> str:
    """What to do where a loss or a gradient is not finite."""
    other = ", or a bounded divergence such as jensen_shannon" if unbounded else ""
    return f"Resume from the last checkpoint in {folder}, with --accept-changes and a lower learning_rate{other}"
