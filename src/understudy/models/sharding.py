"""Models whose weights are sharded over processes, by FSDP2 or DeepSpeed ZeRO-3: which they are, and gathering them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SHARDING = ("torch.distributed.", "deepspeed.")  # the modules whose hooks gather weights before a forward


def is_shard(weight: Any) -> bool:
    """Does this process hold only its share of a weight (FSDP2's DTensor, ZeRO-3's empty parameter)?"""
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Are some of the model's weights, or all, sharded over processes?"""
    return any(map(is_shard, model.parameters()))


def whole_shape(weight: Any) -> torch.Size:
    """The shape of a weight, also where ZeRO-3 keeps none of it in this process."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def shard_layers(model: Any, device: torch.device) -> None:
    """Shard a frozen model's layers over all processes with FSDP2, on `device`; once, if it is called again.

    Embeddings and head stay whole in every process: they are used outside the model's forward as well.

    Raises:
        ValueError: for a single process, for adapters or quantized weights, and for a model whose layers are not known.
    """
    if is_sharded(model):
        return
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError("there is one process, and nothing to shard over: start with torchrun, or leave shard out")
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the layers of {type(model).__name__} cannot be sharded: leave shard out")
    whole = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    for layer in whole:
        layer.to(device)
    options = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "reshard_after_forward": True,
        "ignored_params": {parameter for layer in whole for parameter in layer.parameters()},
    }
    for layer in [*layers, model]:
        fully_shard(layer, **options)


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
