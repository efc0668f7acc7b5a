"""Models whose weights are sharded over processes, by FSDP2 or DeepSpeed ZeRO-3: which they are, and gathering them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SHARDING = ("torch.distributed.", "deepspeed.")  # the modules whose hooks gather weights before a forward


def is_shard(weight: Any) -> bool:
    """Does this process hold only its share of a weight (FSDP2's DTensor, ZeRO-3's empty parameter)?"""
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Are some of the model's weights, or all, sharded over processes?"""
    return any(map(is_shard, model.parameters()))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within this block every process holds all weights, and forwards of the model do not communicate.

    So processes may run different numbers of forwards, as generation does, and weights are not gathered again for every
    token. All processes must enter the block. The weights must not be changed in it.
    """
    if not is_sharded(model):
        yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        with _gathered_by_deepspeed(model), _without_hooks(model):
            yield
    finally:
        for unit in units:
            unit.reshard()


@contextmanager
def _gathered_by_deepspeed(model: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within this block, the hooks that gather and shard weights around each module's forward do not run."""
    saved = [(hooks := getattr(module, name), hooks.copy()) for module in model.modules() for name in _HOOKS]
    for hooks, _ in saved:
        for key, hook in list(hooks.items()):
            if str(getattr(hook, "__module__", "")).startswith(_SHARDING):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in saved:
            hooks.clear()
            hooks.update(before)
