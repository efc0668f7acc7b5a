"""The preallocated key-value cache against transformers' DynamicCache."""

import logging
from inspect import signature

import pytest
import torch
from fakes import tiny
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

from understudy.generation.kv_cache import FixedLayer, PreallocatedLayer, can_drop_rows, preallocated_cache


def states(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, length, 4, generator=generator)
    return keys, values


def test_a_preallocated_layer_equals_a_dynamic_one():
    """A prompt, tokens beyond the first allocation, dropped rows, more tokens."""
    preallocated, dynamic, rows = PreallocatedLayer(), DynamicLayer(), 5
    for step in range(60):
        new = states(rows, 7 if step == 0 else 1, step)
        for one, other in zip(preallocated.update(*new), dynamic.update(*new), strict=True):
            assert torch.equal(one, other)
        if step in (3, 40):
            indices = torch.tensor([0, 2, 3] if step == 3 else [1])
            for layer in (preallocated, dynamic):
                layer.batch_select_indices(indices)
            rows = len(indices)
        assert preallocated.get_seq_length() == dynamic.get_seq_length() == 7 + step
        if hasattr(dynamic, "get_max_length"):  # the oldest transformers takes positions instead of a length
            assert preallocated.get_mask_sizes(1) == dynamic.get_mask_sizes(1)


def test_memory_is_allocated_rarely():
    layer, places = PreallocatedLayer(), set()
    for step in range(200):
        keys, _ = layer.update(*states(3, 1, step))
        places.add(keys.data_ptr())
    assert len(places) < 10


def test_positions_may_be_written_by_a_compiled_forward():
    """A compiled forward gets a view of the memory that is never all of it."""
    preallocated, dynamic = PreallocatedLayer(), DynamicLayer()
    for layer in (preallocated, dynamic):
        layer.update(*states(3, 7, 0))
    for step in range(7, 100):
        new = states(3, 1, step)
        memory = preallocated.extend(step + 1, -(-(step + 1) // 32) * 32)
        fixed = FixedLayer(*memory, torch.tensor([step]))
        assert fixed.get_mask_sizes(1) == (memory[0].shape[2], 0)
        fixed_states, expected = fixed.update(*new), dynamic.update(*new)
        for buffer, views, other in zip(fixed_states, (preallocated.keys, preallocated.values), expected, strict=True):
            assert not buffer.is_contiguous()
            assert torch.equal(buffer[:, :, : step + 1], other)
            assert torch.equal(views, other)
            assert (buffer[:, :, step + 1 :] == 0).all()


def test_rows_may_be_dropped_from_an_empty_layer():
    PreallocatedLayer().batch_select_indices(torch.tensor([0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "opt", "phi"])
def test_models_compute_the_same_logits_with_the_preallocated_cache(kind):
    model = tiny(kind)
    ids = torch.randint(4, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    cache = preallocated_cache(model)
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # since transformers 5.24
    options = {name: cache, "use_cache": True}
    logits = [model(part, **options).logits for part in ids.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)
    if kind != "gemma2":  # whose one layer has a sliding window
        assert any(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def test_a_cache_that_cannot_drop_rows_is_detected_and_logged(caplog):
    cache = DynamicCache()
    linear_attention = getattr(cache_utils, "LinearAttentionLayer", object)  # the oldest transformers has none
    cache.layers = [DynamicLayer(), linear_attention()]
    with caplog.at_level(logging.INFO, "understudy.generation.kv_cache"):
        assert not can_drop_rows(cache)
    assert "rows of a DynamicCache cannot be dropped" in caplog.text
    cache.layers.pop()
    assert can_drop_rows(cache)
