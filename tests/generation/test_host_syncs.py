"""How often the decode loop waits for the device: at most once per token.

There is no GPU to ask, so the calls that would wait for one are counted on a CPU: numbers that Python reads from
tensors, and operations whose result's shape depends on values.
"""

from collections import Counter

import pytest
import torch
from fakes import VOCABULARY, Forgetful, tiny, words
from torch.utils._python_dispatch import TorchDispatchMode

from understudy.batch import Example
from understudy.generation import cache_support
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step

_DATA_DEPENDENT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class Syncs(TorchDispatchMode):
    """Counts operations that would make a host wait for a GPU, by name; `tolist` is counted by `counted_tolist`."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _DATA_DEPENDENT or by_mask:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def syncs(monkeypatch):
    counter, tolist = Syncs(), torch.Tensor.tolist

    def counted_tolist(tensor):
        counter.calls["tolist"] += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    return counter


def syncs_of(model, prompts, length, syncs, **sampling):
    examples = [Example(prompt, [], row=row) for row, prompt in enumerate(prompts)]
    sampling = Sampling(length, stop_ids=(VOCABULARY,), **sampling)  # nothing stops, so every token is counted
    rollout = GenerateRollout().bind(model, words())
    cache_support.cache_support(model, VOCABULARY)  # tried once per model
    syncs.calls.clear()
    with syncs:
        rollout.generate(examples, sampling, Step(0))
    return syncs.calls.total()


RAGGED, EQUAL = [[5, 6, 7], [8], [9, 10]], [[5, 6], [8, 7]]


@pytest.mark.parametrize(
    ("family", "prompts", "sampling"),
    [
        ("llama", RAGGED, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "logprobs": True}),
        ("llama", EQUAL, {}),
        ("qwen3", RAGGED, {"temperature": 0.0}),
        ("gpt2", RAGGED, {}),
    ],
    ids=["all options", "without padding", "greedy", "gpt2"],
)
def test_the_decode_loop_waits_for_the_device_at_most_once_per_token(family, sampling, prompts, syncs):
    few, many = (syncs_of(tiny(family), prompts, length, syncs, **sampling) for length in (4, 12))
    assert many > 0, "the loop reads whether all rows are finished: a count of none would be one that misses calls"
    assert (many - few) / 8 <= 1, syncs.calls


def test_a_model_without_a_cache_is_read_again_and_waits_no_more_often(syncs):
    """With eager attention, because scaled dot product attention looks at the mask of a whole sequence itself."""
    model = Forgetful().eval()
    model.inner.set_attn_implementation("eager")
    few, many = (syncs_of(model, RAGGED, length, syncs) for length in (4, 12))
    assert (many - few) / 8 == 1, syncs.calls


def test_the_counter_counts_what_waits(syncs):
    x = torch.arange(3)
    with syncs:
        for wait in (lambda: bool(x.sum() > 0), x.max().item, x.tolist, lambda: x[x > 0], x.nonzero, lambda: int(x[0])):
            wait()
    assert syncs.calls.total() >= 6
