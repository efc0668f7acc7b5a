"""Fixtures for tests of fused linear losses."""

import os

import pytest
import torch

from understudy.fused_linear import kernel


@pytest.fixture(autouse=True)
def no_fallback():
    """Fail where a function could not be compiled: its plain fallback would prove nothing about compiled code."""
    if "TEST_COMPILED" in os.environ:
        torch.compiler.reset()  # torch limits the number of variants of a function
    yield
    assert kernel._compiled_kernel._kernel is not kernel._compiled_kernel._fallback


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} rows a tile")
def tile_rows(request, monkeypatch):
    monkeypatch.setattr("understudy.fused_linear.loss.rows_per_tile", lambda vocabulary, device: request.param)
