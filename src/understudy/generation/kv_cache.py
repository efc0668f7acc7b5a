"""A key-value cache with room to grow, for writing token by token.

The one idea: transformers' own cache makes itself anew, one token longer, at every token, so that writing T of them
moves T² / 2. This one writes into memory that it asked for ahead.
"""

import logging
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_log = logging.getLogger(__name__)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (R, heads, T, width), as views of the part in use of something longer."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        self._make_room(key_states, value_states, end)
        self._write(slice(used, end), key_states, value_states)
        return self._use(end)

    def extend(self, length: int, seen: int) -> tuple[Tensor, Tensor]:
        """Take the next positions into use, up to `length`, for somebody else to write; views of the first `seen`."""
        keys, values = self._use(self.get_seq_length())
        self._make_room(keys, values, seen)
        self._use(length)
        assert self._room is not None
        return self._room[0][:, :, :seen], self._room[1][:, :, :seen]

    def _make_room(self, keys: Tensor, values: Tensor, end: int) -> None:
        """For `end` positions of states like these; what is in use stays."""
        before, used = self._room, self.get_seq_length()
        if before is None or end >= before[0].shape[-2]:  # never quite full: a view of all is another kind of memory
            self._room = (_longer(keys, end), _longer(values, end))
            if before is not None:
                self._write(slice(0, used), before[0][:, :, :used], before[1][:, :, :used])

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
    return states.new_zeros(rows, heads, length + length // 2 + 16, width)  # what is masked may be looked at


class FixedLayer(CacheLayerMixin):
    """Keys and values of which the positions before `at` (1,) are written, for a forward that writes the next one.

    Its shapes stay while it is written to, which is what compiling needs. It never grows, and lives for one forward.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._at, self.is_initialized = keys, values, at, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a layer of fixed size is given its memory")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys.index_copy_(2, self._at, key_states), self.values.index_copy_(2, self._at, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        return self._at

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]


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
