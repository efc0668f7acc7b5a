"""A packed row of 32k tokens: the gradients of padded rows, without arrays of tokens × vocabulary or tokens²."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from fakes import tiny
from packed_attention import ATTENTION
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from understudy.batch import Batch, Example
from understudy.divergences import JensenShannon
from understudy.fused_linear.tiles import tiling
from understudy.models.forward import score
from understudy.models.inputs import model_inputs
from understudy.scores import Scores
from understudy.teachers.local import LocalTeacher

LENGTHS = range(260, 772, 8)  # of 64 sequences, 2 ** 15 tokens together
VOCABULARY, LARGEST = 256, 2**23


class LargestArray(TorchDispatchMode):
    """The bytes of the largest array that any operation within this block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arrays = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *(array.untyped_storage().nbytes() for array in arrays)])
        return result


def loss(model: Any, teacher: LocalTeacher, batch: Batch) -> torch.Tensor:
    expected = teacher.score(batch)

    def divergence(student: Scores) -> torch.Tensor:
        return expected.divergence_to(student, JensenShannon()).sum()

    return score(model, batch, divergence, weights=torch.ones(len(batch.tokens), device=batch.tokens.device))


HAS_FLASH = torch.cuda.is_available() and find_spec("flash_attn") is not None
FLASH = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FLASH, reason="needs CUDA and flash-attn")]


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "tolerance"),
    [
        (ATTENTION, "cpu", torch.float32, 1e-4),
        pytest.param("flash_attention_2", "cuda", torch.bfloat16, 0.1, marks=FLASH),  # not run yet
    ],
)
def test_a_packed_row_of_32k_tokens_has_the_gradients_of_padded_rows_in_memory_that_is_flat(
    attention, device, dtype, tolerance
):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    batch = Batch.from_examples([Example(x[:1], x[1:], row=row) for row, x in enumerate(ids)], pad=0, device=device)
    student, teacher = tiny("llama", VOCABULARY, seed=1), tiny("llama", VOCABULARY, width=32, seed=2)
    student, teacher = student.train().to(device, dtype), teacher.to(device, dtype)
    for part, _ in batch.split_by_length(2**13):
        loss(student, LocalTeacher(teacher), part).backward()
    padded = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    for model in (student, teacher):
        model.config._attn_implementation = attention
    student.gradient_checkpointing_enable()
    assert model_inputs(student, batch)[0]["input_ids"].shape == (1, 2**15)
    with tiling(memory_mb=8), LargestArray() as largest:
        loss(student, LocalTeacher(teacher), batch).backward()
    assert largest.bytes <= LARGEST, "logits would take 32 MB, and a mask of 32k × 32k a gigabyte"
    for name, parameter in student.named_parameters():
        assert (parameter.grad - padded[name]).norm() < tolerance * padded[name].norm(), name
