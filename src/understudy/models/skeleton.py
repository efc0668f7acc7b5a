"""Models without weights: parameters with shapes and dtypes, from a configuration alone; forwards compute nothing.

A skeleton is on PyTorch's meta device. Within `without_memory` it runs, on tensors that stand for the CPU's: every
operation gives shapes and dtypes only.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from ..recipe import RecipeError

_ABSMAX_BYTES = 4 / 64  # of bitsandbytes' 4-bit weights: a float32 for each block of 64
_GROUP_BYTES = 4 / 128  # of GPTQ and AWQ: scale and zero point for each group of 128, as usual


def skeleton(config: Any, dtype: str, auto_class: Any = AutoModelForCausalLM) -> Any:
    """The model of a configuration without weights; dtype auto is that of the checkpoint."""
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=weights_dtype(config, dtype), trust_remote_code=False)


@contextmanager
def without_memory(*models: nn.Module) -> Iterator[None]:
    """Tensors that are created in this block have no memory, and nothing is computed; these skeletons run in it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # operations without shape functions are the caller's errors
    try:
        with FakeTensorMode():
            for model in models:
                _replace_meta_tensors(model)
            yield
    finally:
        logger.setLevel(level)


def _replace_meta_tensors(model: nn.Module) -> None:
    """Replace the model's tensors by those that this block creates; tied ones stay tied."""
    created: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in created:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    created[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    tensors[name] = created[id(tensor)]


def weights_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype in which weights are loaded; where the configuration names none, float32.

    Raises:
        RecipeError: for a dtype that is none.
    """
    known: Any = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
    known = getattr(torch, known, None) if isinstance(known, str) else known
    if not isinstance(known, torch.dtype):
        raise RecipeError(f'there is no dtype "{dtype}": use bfloat16, float16, float32 or auto')
    return known


def weight_bytes(model: nn.Module, quantization: Mapping[str, Any] | None = None) -> int:
    """The bytes of a model's parameters; those of its linear layers, except the head, as they are when quantised.

    Without a quantisation this is exact. Buffers, a few kilobytes, are not counted.
    """
    per_weight = None if quantization is None else bytes_per_weight(quantization)
    if per_weight is None:
        return sum(p.nbytes for p in model.parameters())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = tuple(quantization.get("llm_int8_skip_modules") or ()) if quantization else ()
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.endswith(skipped or ("\n",))
    }
    return sum(int(p.numel() * per_weight) if id(p) in linear else p.nbytes for p in model.parameters())


def bytes_per_weight(quantization: Mapping[str, Any]) -> float | None:
    """Bytes of a quantised weight with its share of the scales; None for a scheme that is not known here."""
    if quantization.get("load_in_4bit"):
        return 0.5 + (_ABSMAX_BYTES / 4 if quantization.get("bnb_4bit_use_double_quant") else _ABSMAX_BYTES)
    if quantization.get("load_in_8bit") or quantization.get("quant_method") == "fp8":
        return 1.0
    bits = quantization.get("bits", quantization.get("w_bit"))
    return bits / 8 + _GROUP_BYTES if isinstance(bits, int) else None


def quantization_of(config: Any, fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The fields that weights are quantised by: those given, or those of a checkpoint that is quantised already."""
    if fields:
        return fields
    own: Any = getattr(config, "quantization_config", None)
    return own.to_dict() if hasattr(own, "to_dict") else own


def missing_package(fields: Mapping[str, Any] | None) -> str | None:
    """The package that quantising by these fields of `BitsAndBytesConfig` needs, if it is not installed."""
    return "bitsandbytes" if fields and find_spec("bitsandbytes") is None else None
