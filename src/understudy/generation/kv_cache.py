"""A preallocated key-value cache, for generating token by token.

transformers' DynamicCache is copied at every token, so that generating T tokens copies T²/2 positions. This cache
writes into memory that it has allocated ahead.
"""

import logging
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_log = logging.getLogger(__name__)


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values (R, heads, T, width), as views of the used part of a longer buffer."""

    _memory: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        self._reserve(key_states, value_states, end)
        self._write(slice(used, end), key_states, value_states)
        return self._use(end)

    def extend(self, length: int, visible: int) -> tuple[Tensor, Tensor]:
        """Extend the used part to `length` positions, which the caller writes; returns views of the first `visible`."""
        keys, values = self._use(self.get_seq_length())
        self._reserve(keys, values, visible)
        self._use(length)
        assert self._memory is not None
        return self._memory[0][:, :, :visible], self._memory[1][:, :, :visible]

    def _reserve(self, keys: Tensor, values: Tensor, end: int) -> None:
        """Allocate memory for `end` positions of states like these; what is already written is copied."""
        before, used = self._memory, self.get_seq_length()
        if before is None or end >= before[0].shape[-2]:  # never full: compiled code differs for a view of all of it
            self._memory = (_allocate(keys, end), _allocate(values, end))
            if before is not None:
                self._write(slice(0, used), before[0][:, :, :used], before[1][:, :, :used])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._memory is not None:
            used = self.get_seq_length()
            self._memory = (self._memory[0][indices], self._memory[1][indices])
            self._use(used)

    def _write(self, positions: slice, keys: Tensor, values: Tensor) -> None:
        assert self._memory is not None
        self._memory[0][:, :, positions], self._memory[1][:, :, positions] = keys, values

    def _use(self, end: int) -> tuple[Tensor, Tensor]:
        assert self._memory is not None
        keys, values = self.keys, self.values = self._memory[0][:, :, :end], self._memory[1][:, :, :end]
        return keys, values


def _allocate(states: Tensor, length: int) -> Tensor:
    rows, heads, _, width = states.shape
    return states.new_zeros(rows, heads, length + length // 2 + 16, width)  # masked positions may be read


class FixedLayer(CacheLayerMixin):
    """Keys and values of a fixed length, filled up to `position` (1,), for one forward that writes the next position.

    Its shapes do not change while it is written to, which compiling needs.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._position, self.is_initialized = keys, values, position, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the memory of a FixedLayer is passed to its constructor")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = self.keys.index_copy_(2, self._position, key_states)
        return keys, self.values.index_copy_(2, self._position, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        return self._position

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]

    get_max_cache_shape = get_max_length  # its name in the oldest transformers


def preallocated_cache(model: Any) -> Any:
    """An empty cache, preallocated in the layers that store all positions; None: the model creates its own."""
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not supported():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers:
        cache.layer_class_to_replicate = PreallocatedLayer
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_drop_rows(cache: Any) -> bool:
    """Can finished rows be dropped from the cache? Logs where they cannot."""
    layers = getattr(cache, "layers", None)
    can_drop = bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)
    if not can_drop:
        _log.info("the rows of a %s cannot be dropped; finished ones stay in the batch", type(cache).__name__)
    return can_drop
