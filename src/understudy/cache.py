"""A key-value cache with room to grow, for writing token by token.

The one idea: transformers' own cache makes itself anew, one token longer, at every token, so that writing T of them
moves T² / 2. This one writes into memory that it asked for ahead.
"""

import logging
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_log = logging.getLogger(__name__)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (R, heads, T, width), as views of the part in use of something longer."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        before = self._room
        if before is None or end > before[0].shape[-2]:
            self._room = (_longer(key_states, end), _longer(value_states, end))
            if before is not None:
                self._write(slice(0, used), before[0][:, :, :used], before[1][:, :, :used])
        self._write(slice(used, end), key_states, value_states)
        return self._use(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._room is not None:
            used = self.get_seq_length()
            self._room = (self._room[0][indices], self._room[1][indices])
            self._use(used)

    def _write(self, at: slice, keys: Tensor, values: Tensor) -> None:
        assert self._room is not None
        self._room[0][:, :, at], self._room[1][:, :, at] = keys, values

    def _use(self, end: int) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        keys, values = self.keys, self.values = self._room[0][:, :, :end], self._room[1][:, :, :end]
        return keys, values


def _longer(states: Tensor, length: int) -> Tensor:
    rows, heads, _, width = states.shape
    return states.new_empty(rows, heads, length + length // 2 + 16, width)


def roomy_cache(model: Any) -> Any:
    """An empty cache for `model`, with room in the layers that keep everything; None lets the model make its own."""
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not supported():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers:
        cache.layer_class_to_replicate = RoomyLayer
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_drop_rows(cache: Any) -> bool:
    """Can some of the rows leave the cache? Said in the log where they cannot."""
    layers = getattr(cache, "layers", None)
    able = bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)
    if not able:
        _log.info("the rows of a %s cannot be dropped; finished ones stay in the batch", type(cache).__name__)
    return able
