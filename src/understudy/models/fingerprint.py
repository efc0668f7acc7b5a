"""Hashes of a model's weights and of a tokenizer, by which another one of the same name is recognised."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from .load import PROBE

_WHOLE, _SAMPLES = 65536, 4096  # elements
_PART = 1 << 22  # elements that are summed at once, because a CPU copies them as 64-bit integers
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: Any) -> str:
    """A hash of a model's weights: 16 hexadecimal digits.

    Of each tensor it reads all elements up to 65,536 of them, else 4,096 and the sum of all elements' bits.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        if type(weight) is Tensor and weight.device.type != "meta":
            digest.update(_content(weight.detach()))
    return digest.hexdigest()[:16]


def _content(weight: Tensor) -> bytes:
    if weight.element_size() not in _INTEGERS:
        weight = torch.view_as_real(weight)  # complex128
    bits = weight.contiguous().reshape(-1).view(_INTEGERS[weight.element_size()])
    if len(bits) <= _WHOLE:
        return bits.cpu().numpy().tobytes()
    sample = bits[:: len(bits) // _SAMPLES]
    total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_PART))
    return sample.cpu().numpy().tobytes() + str(total).encode()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens, rules, special tokens and chat template: 16 hexadecimal digits."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if hasattr(backend, "to_str") else None
    if isinstance(rules, dict):  # settings of the last call
        rules = {name: part for name, part in rules.items() if name not in ("truncation", "padding")}
    parts = [sorted(tokenizer.get_vocab().items()), rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and of how it splits a text: 16 hexadecimal digits.

    Two tokenizers that `load.refuse_other_tokens` takes for the same have the same hash.
    """
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.encode(PROBE, add_special_tokens=False)])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
