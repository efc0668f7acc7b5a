"""Tiles of (rows, V): the number of rows that are computed at once, and the memory for them.

Shapes: V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

_BLOCK = {"cpu": 2**18, "cuda": 2**25}  # elements at once: a CPU's cache; on a GPU 128 MB for an intermediate array
_MEMORY_MB = 256.0  # on a CPU, and the least on a GPU
_MOST_ROWS = {"cpu": 1024, "cuda": 2048}
_MB = 2**20


@dataclass(frozen=True)
class Tiling:
    """The memory for tiles, and what computes the kernel between the matrix products.

    `memory_mb` is for a tile of the student, one of the teacher, one of gradients, and a half to spare; None: what
    `default_memory_mb` says for the device.
    """

    memory_mb: float | None = None
    compiled: bool | None = None  # None: not compiled, but `fused_divergence` is once it has been called often enough
    triton: bool = False  # the experimental Triton kernel, for the losses that it has (triton_kernel.py)
    blocks: bool = True  # on a CPU, between the products, blocks of rows that fit into its cache


_tiling: ContextVar[Tiling] = ContextVar("tiling", default=Tiling())  # noqa: B039  (it is frozen)


def current_tiling() -> Tiling:
    """The tiling of the current context."""
    return _tiling.get()


@contextmanager
def tiling(
    memory_mb: float | None = None,
    compiled: bool | None = None,
    triton: bool | None = None,
    blocks: bool | None = None,
) -> Iterator[None]:
    """Set fields of the tiling, within this block; None: unchanged.

    Raises:
        ValueError: for the Triton kernel where Triton is not installed.
    """
    if triton and find_spec("triton") is None:
        raise ValueError("triton is not installed: leave out triton=True, or `pip install triton`")
    changes = {"memory_mb": memory_mb, "compiled": compiled, "triton": triton, "blocks": blocks}
    token = _tiling.set(replace(current_tiling(), **{name: x for name, x in changes.items() if x is not None}))
    try:
        yield
    finally:
        _tiling.reset(token)


def rows_per_tile(vocabulary: int, device: torch.device) -> int:
    """The number of rows of a tile, such that three and a half tiles of float32 fit into the memory.

    From 16 to 1024 on a CPU, where more rows do not make the matrix products faster. On a GPU to 2048: the gradient of
    a head in bfloat16 moves about 12 bytes of memory per weight and tile, for two operations per weight and row, so
    that an H100 (989 Tflop/s, 3.35 TB/s) needs about 1800 rows to be busy computing. That is arithmetic, not a
    measurement.
    """
    memory_mb = current_tiling().memory_mb or default_memory_mb(device)
    most = _MOST_ROWS.get(device.type, _MOST_ROWS["cpu"])
    return min(most, max(16, int(memory_mb * _MB / (4 * 3.5 * vocabulary))))


def default_memory_mb(device: torch.device) -> float:
    """The memory for tiles where none is set, in MiB: 256, or on a GPU a sixteenth of its memory.

    On a GPU it is halved until it is at most a quarter of what is free, but not below 256. So it is the same in every
    step, and in a resumed run on the same card, unless memory is scarce: the number of rows changes the rounding.
    """
    if device.type != "cuda":
        return _MEMORY_MB
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, but not in use
    memory_mb = total / 16 / _MB
    while memory_mb > max(_MEMORY_MB, free / 4 / _MB):
        memory_mb /= 2
    return max(_MEMORY_MB, memory_mb)


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
    """The rows of a tile (C, V) in blocks: intermediate arrays fit into a CPU's cache, and take 128 MB on a GPU."""
    rows = max(1, _BLOCK.get(product.device.type, _BLOCK["cuda"]) // product.shape[1])
    rows = rows if current_tiling().blocks else len(product)
    return (slice(start, start + rows) for start in range(0, len(product), rows))
