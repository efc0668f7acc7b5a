"""Decode token by token with a key-value cache: the next-token logits of a batch of sequences.

A decoder holds the state between tokens (cache, mask, positions), and can drop finished rows. `CompiledDecoder` is
faster per token, after about ten seconds of compiling; `RecomputingDecoder` is for models without a usable cache.

Shapes: R rows, T positions read so far (padding on the left), V vocabulary.
"""

from collections.abc import Sequence
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..fused_linear.compiling import CompiledFunction
from ..models.adapters import without_adapters
from .kv_cache import FixedLayer, PreallocatedLayer, can_drop_rows, preallocated_cache

_STEP = 32  # the number of positions that a compiled forward attends to is a multiple of this


class Decoder:
    """Runs a model on prompts, and then on one more token of every row at a time."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], longest: int, drops_rows: bool = True) -> None:
        """`longest`: the largest number of tokens that will be read after the prompts."""
        width, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
        padding = [[0] * (width - len(prompt)) for prompt in prompts]
        self._model = model
        self._prompts = torch.tensor([[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)])
        room = longest + _STEP
        self._mask = torch.tensor([pad + [1] * (width - len(pad) + room) for pad in padding], device=device)
        self._positions = (self._mask[:, :width].cumsum(-1) - 1).clamp(min=0)  # position ids, padding not counted
        self._padded = any(padding)
        self._read = 0  # T
        self._cache: Any = preallocated_cache(without_adapters(model))
        self._can_drop: bool | None = None if drops_rows else False
        parameters = signature(without_adapters(model).forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        if "output_router_logits" in parameters:
            self._options["output_router_logits"] = False  # the router's loss is of whole sequences
        self._takes_position_ids = "position_ids" in parameters
        self._takes_cache_position = "cache_position" in parameters  # in the oldest transformers
        # The name of the cache, of the argument as of the output, depends on the version of transformers.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def prompts(self) -> Tensor:
        """(R, V) the logits after the prompts."""
        return self._next(self._prompts.to(self._mask.device))

    def tokens(self, tokens: Tensor) -> Tensor:
        """(R, V) the logits after one more token of every row, (R,)."""
        self._positions = self._positions[:, -1:] + 1
        return self._next(tokens[:, None], **self._mask_of_token(self._read + 1))

    def _mask_of_token(self, length: int) -> dict[str, Any]:
        """The mask of one more token, where a model can read it in a form that needs no look at its values.

        With scaled dot product attention transformers reads a mask (R, T) back from the device at every forward, to
        see whether there is any padding. That is known here: without padding there is no mask, and otherwise it is the
        (R, 1, 1, T) that every layer uses, where no layer has a window.
        """
        model: Any = without_adapters(self._model)
        sdpa = model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False)
        if not sdpa or not self._positional_layers():
            return {}
        return {"attention_mask": self._mask[:, None, None, :length].bool() if self._padded else None}

    def _positional_layers(self) -> bool:
        """Does every layer store keys and values by position? Sliding windows and recurrent states do not."""
        return all(type(layer) is PreallocatedLayer for layer in getattr(self._cache, "layers", [None]))

    def drop(self, keep: Tensor) -> bool:
        """Continue with the rows `keep` only, if the cache can drop the others; returns whether it can."""
        if self._can_drop is None:
            self._can_drop = can_drop_rows(self._cache)
        if self._can_drop:
            self._cache.batch_select_indices(keep)
            self._mask, self._positions = self._mask[keep], self._positions[keep]
        return self._can_drop

    def _next(self, ids: Tensor, **inputs: Any) -> Tensor:
        self._read += ids.shape[1]
        inputs = self._inputs(ids, self._read) | inputs
        output = self._model(**inputs, **{self._cache_name: self._cache}, use_cache=True)
        self._cache = getattr(output, self._cache_name, None)
        if self._cache is None:
            raise ValueError(f"it returns no {self._cache_name}")
        return output.logits[:, -1]

    def _inputs(self, ids: Tensor, length: int) -> dict[str, Any]:
        position_ids = {"position_ids": self._positions} if self._takes_position_ids else {}
        return {"input_ids": ids, "attention_mask": self._mask[:, :length], **position_ids, **self._options}


class RecomputingDecoder:
    """A Decoder for models without a usable cache: every token reads the whole sequences again, padded on the right."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], longest: int) -> None:
        device = model.get_input_embeddings().weight.device
        self._longest = max(map(len, prompts))  # of all rows' lengths, known without waiting for the device
        width = self._longest + longest
        self._model = model
        self._ids = torch.tensor([[*prompt] + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def prompts(self) -> Tensor:
        """(R, V) the logits after the prompts."""
        ids = self._ids[:, : self._longest]
        mask = (torch.arange(ids.shape[1], device=ids.device) < self._lengths[:, None]).long()
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(ids), device=ids.device), self._lengths - 1]

    def tokens(self, tokens: Tensor) -> Tensor:
        """(R, V) the logits after one more token of every row, (R,)."""
        self._ids[torch.arange(len(tokens), device=tokens.device), self._lengths] = tokens
        self._lengths, self._longest = self._lengths + 1, self._longest + 1
        return self.prompts()

    def drop(self, keep: Tensor) -> bool:
        """Continue with the rows `keep` only."""
        self._ids, self._lengths = self._ids[keep], self._lengths[keep]
        return True


class CompiledDecoder(Decoder):
    """A Decoder with a compiled forward for the tokens after the prompts, one for all numbers of rows and positions."""

    def tokens(self, tokens: Tensor) -> Tensor:
        if not self._positional_layers():
            return super().tokens(tokens)
        position = tokens.new_full((1,), self._read)  # torch.tensor would wait for the device
        self._read, self._positions = self._read + 1, self._positions[:, -1:] + 1
        visible = -(-self._read // _STEP) * _STEP
        inputs = self._inputs(tokens[:, None], visible)
        if self._takes_cache_position:  # by default models compute it from a length that is a number, not a tensor
            inputs["cache_position"] = position
        memory = [layer.extend(self._read, visible) for layer in self._cache.layers]
        by_row = [x for name, x in inputs.items() if torch.is_tensor(x) and name != "cache_position"]
        for tensor in (*by_row, *chain(*memory)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in (inputs["attention_mask"], *chain(*memory)):
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() // 2)
        return _compiled(self._model, self._cache_name, inputs, memory, position)


def _forward(
    model: Any, cache_name: str, inputs: dict[str, Any], memory: list[tuple[Tensor, Tensor]], position: Tensor
) -> Tensor:
    cache = Cache(layers=[FixedLayer(keys, values, position) for keys, values in memory])
    return model(**inputs, **{cache_name: cache}, use_cache=True).logits[:, -1]


_compiled = CompiledFunction(_forward, "the model cannot be compiled here, which makes generating slower")
