"""Tiles of (rows, V): the number of rows that are computed at once, and the memory for them.

Shapes: V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 2**18  # elements that a CPU processes at once, so that intermediate arrays stay in its cache


@dataclass(frozen=True)
class Tiling:
    """The memory for tiles, and whether the kernel between the matrix products is compiled."""

    memory_mb: float = 256.0  # for a tile of the student, one of the teacher, one of gradients, and a half to spare
    compiled: bool = False
    blocks: bool = True  # on a CPU, between the products, blocks of rows that fit into its cache


_tiling: ContextVar[Tiling] = ContextVar("tiling", default=Tiling())  # noqa: B039  (it is frozen)


def current_tiling() -> Tiling:
    """The tiling of the current context."""
    return _tiling.get()


@contextmanager
def tiling(memory_mb: float | None = None, compiled: bool | None = None, blocks: bool | None = None) -> Iterator[None]:
    """Set fields of the tiling, within this block; None: unchanged."""
    changes = {"memory_mb": memory_mb, "compiled": compiled, "blocks": blocks}
    token = _tiling.set(replace(current_tiling(), **{name: x for name, x in changes.items() if x is not None}))
    try:
        yield
    finally:
        _tiling.reset(token)


def rows_per_tile(vocabulary: int) -> int:
    """The number of rows of a tile, such that three and a half tiles of float32 fit into the memory.

    From 16 to 1024: more rows do not make the matrix products faster.
    """
    return min(1024, max(16, int(current_tiling().memory_mb * 2**20 / (4 * 3.5 * vocabulary))))


def zero_tile(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """(rows, V) of zeros; rows begin at multiples of 16 elements, a cache line of float32.

    All of the memory is initialised, padding included: a matrix product may read beyond the end of a row (oneDNN does
    with AMX) and multiply it by 0, and 0 times an uninitialised NaN is NaN. The memory has one row more than the tile,
    because code that is compiled for all of a tensor's memory is compiled again for a part of it.
    """
    return torch.zeros(rows + 1, -(-vocabulary // 16) * 16, dtype=like.dtype, device=like.device)[:rows, :vocabulary]


def product_and_gradient_tiles(rows: int, vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, V) for the head's products and for their gradients: the same memory, but two tiles for compiled code."""
    tile = zero_tile(rows, vocabulary, like)
    return tile, zero_tile(rows, vocabulary, like) if current_tiling().compiled else tile


def row_blocks(product: Tensor) -> Iterator[slice]:
    """The rows of a tile (C, V) in blocks that fit into a CPU's cache; all of them at once on other devices."""
    in_blocks = product.device.type == "cpu" and current_tiling().blocks
    rows = max(1, _BLOCK // product.shape[1]) if in_blocks else len(product)
    return (slice(start, start + rows) for start in range(0, len(product), rows))
