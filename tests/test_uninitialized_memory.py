"""No matrix product may read memory that was never written, on any processor.

oneDNN's AMX kernels read beyond the rows of a strided operand and multiply the values by 0, so that uninitialised
NaN there become NaN in the result. Here uninitialised memory holds NaN, and the whole memory behind every operand of a
matrix product is looked at, so that processors without AMX show the defect as well.
"""

import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, words
from loop import trainer, weights
from torch.utils._python_dispatch import TorchDispatchMode

from understudy.batch import Example
from understudy.methods import METHODS
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class WholeOperands(TorchDispatchMode):
    """Fails where a product's operand is a view of memory that holds NaN anywhere, also outside the view."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            for operand in (x for x in args if isinstance(x, torch.Tensor) and not x.is_contiguous()):
                memory = torch.empty(0, dtype=operand.dtype).set_(operand.untyped_storage())
                assert not memory.isnan().any(), f"{func} may read memory that was never written"
                self.looked_at += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def filled_with_nan(monkeypatch):
    """torch fills what `torch.empty` returns with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "the test must see something"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", METHODS.names())
def test_bfloat16_training_of_every_method_reads_initialised_memory_only(name, tmp_path, filled_with_nan):
    """20 and more rows, a vocabulary that is no multiple of 32: what the AMX kernel needs to read behind a row."""
    run = trainer(
        tmp_path,
        METHODS.get(name)(),
        sampling=Sampling(max_new_tokens=12),
        examples=[Example(e.prompt, [*e.response[:-1], *range(4, 12), 2], row=e.row) for e in ragged_examples(8)],
        bf16=True,
        max_steps=2,
    )
    before = weights(run.model)
    with WholeOperands() as operands:
        run.train()
    after = weights(run.model)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert not all(torch.equal(before[key], after[key]) for key in before)
    assert operands.looked_at, "the test must see something"


@pytest.mark.parametrize("vocabulary", [50, VOCABULARY, 322, 2047])
def test_bfloat16_weights_are_generated_from_with_initialised_memory_only(vocabulary, filled_with_nan):
    model = tiny("llama", vocabulary=vocabulary).bfloat16()
    prompts = ragged_examples(20, vocabulary=50, responses=False)
    rollout = GenerateRollout().bind(model, words(vocabulary))
    with WholeOperands():
        responses = rollout.generate(prompts, Sampling(max_new_tokens=6), Step(0))
    assert all(token < vocabulary for example in responses for token in example.response)
