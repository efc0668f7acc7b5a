"""Tiles: the number of rows that fits into their memory, on a CPU and on a GPU with a given free memory."""

import pytest
import torch

from understudy.fused_linear.tiles import Tiling, current_tiling, default_memory_mb, row_blocks, rows_per_tile, tiling

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


def test_three_and_a_half_tiles_fit_into_their_memory():
    for memory in (64.0, 256.0):
        with tiling(memory):
            for vocabulary in (100, 32_000, 152_000, 262_144):
                rows = rows_per_tile(vocabulary, CPU)
                assert 16 <= rows <= 1024
                assert rows == 16 or rows * vocabulary * 4 * 3.5 <= memory * 2**20
            assert rows_per_tile(10**9, CPU) == 16
    assert current_tiling() == Tiling(), "the settings end with the block"


@pytest.fixture
def gpu(monkeypatch):
    """Sets the memory that a GPU seems to have: free, all of it, and what torch has reserved without using it."""

    def set_memory(free, total, cached=0.0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), int(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int((cached + 1) * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)

    return set_memory


@pytest.mark.parametrize(
    ("free", "total", "cached", "expected"),
    [
        (60, 80, 0, 5 * 1024),  # a sixteenth of all memory …
        (30, 80, 0, 5 * 1024),  # … which does not change while there is enough
        (10, 80, 0, 2.5 * 1024),  # at most a quarter of what is free
        (1, 80, 9, 2.5 * 1024),  # torch's own memory that is not in use is free
        (22, 24, 0, 1.5 * 1024),
        (0, 80, 0, 256),
        (3, 4, 0, 256),
    ],
)
def test_on_a_gpu_tiles_take_a_share_of_its_memory(free, total, cached, expected, gpu):
    gpu(free, total, cached)
    assert default_memory_mb(GPU) == expected
    with tiling(512):
        assert rows_per_tile(152_000, GPU) == rows_per_tile(152_000, CPU), "a memory that is set is kept to"


def test_a_large_vocabulary_has_enough_rows_for_the_matrix_products_of_a_gpu(gpu):
    gpu(60, 80)
    assert rows_per_tile(151_936, CPU) == 126
    assert rows_per_tile(151_936, GPU) == 2048
    assert 1024 <= rows_per_tile(262_144, GPU) < 2048
    assert default_memory_mb(CPU) == 256


def test_on_a_gpu_blocks_of_rows_bound_the_intermediate_arrays_and_cover_every_row():
    for rows, vocabulary in ((2048, 151_936), (3, 100), (7, 10**9)):
        blocks = [range(rows)[block] for block in row_blocks(torch.empty(rows, vocabulary, device="meta"))]
        assert [row for block in blocks for row in block] == list(range(rows))
        assert all(len(block) == 1 or len(block) * vocabulary * 4 <= 128 * 2**20 for block in blocks)
