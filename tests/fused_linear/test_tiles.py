"""Tiles: the number of rows that fits into their memory."""

from understudy.fused_linear.tiles import Tiling, current_tiling, rows_per_tile, tiling


def test_three_and_a_half_tiles_fit_into_their_memory():
    for memory in (64.0, 256.0):
        with tiling(memory):
            for vocabulary in (100, 32_000, 152_000, 262_144):
                rows = rows_per_tile(vocabulary)
                assert 16 <= rows <= 1024
                assert rows == 16 or rows * vocabulary * 4 * 3.5 <= memory * 2**20
            assert rows_per_tile(10**9) == 16
    assert current_tiling() == Tiling(), "the settings end with the block"
