"""The Triton kernel in Triton's interpreter on a CPU, beside the eager tile.

The interpreter must be chosen before Triton is imported, which other tests may have done, so the tests run themselves
in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from understudy.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from understudy.fused_linear.distributions import Projected
from understudy.fused_linear.head import Head, Transform
from understudy.fused_linear.loss import divergence_loss, row_values
from understudy.fused_linear.tiles import tiling

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and its interpreter (TRITON_INTERPRET=1)",
)
PLAIN = Transform()
N, V, D = 5, 2500, 8  # two blocks of the vocabulary, the second one not full


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
def test_the_tests_of_the_kernel_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_kernel_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"triton is not installed: .*pip install triton"), tiling(triton=True):
        pass


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on a CPU")
def test_on_a_cpu_the_kernel_is_refused_outside_the_interpreter():
    student, teacher = projected(0), projected(1)
    with tiling(triton=True), pytest.raises(ValueError, match="no compiler for CPUs: leave out triton=True"):
        row_values(student, divergence_loss(ForwardKL(), teacher), torch.ones(N))


def projected(seed, dtype=torch.float32, scale=1.0, transform=PLAIN):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) * scale
    bias = torch.randn(V, generator=generator)
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return Projected(tensors[0], Head(tensors[1], tensors[2], transform))


def results(divergence, student, teacher, **settings):
    """Values and gradients, of rows with different weights."""
    weights = torch.linspace(0.5, -1.5, N).to(student.hidden.dtype)
    with tiling(**settings):
        values = row_values(student, divergence_loss(divergence, teacher.detach()), weights, divergence.temperature)
    leaves = (student.hidden, *student.head.tensors().values())
    return values.detach(), *torch.autograd.grad((values * weights).sum(), leaves)


def calls_of_the_kernel(monkeypatch):
    from understudy.fused_linear import triton_kernel

    calls, original = [], triton_kernel.triton_loss
    monkeypatch.setattr(triton_kernel, "triton_loss", lambda *args: calls.append(1) or original(*args))
    return calls


@interpreted
@pytest.mark.parametrize(
    "divergence",
    [
        ForwardKL(),
        ReverseKL(temperature=2.0),
        ForwardKL(temperature=0.5, rescale=True),
        JensenShannon(0.5),
        JensenShannon(0.9, normalized=True, temperature=3.0, rescale=True),
        JensenShannon(0.1),
        JensenShannon(0.0),
        JensenShannon(1.0),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_eager_tile(divergence, monkeypatch):
    calls = calls_of_the_kernel(monkeypatch)
    student, teacher = projected(0), projected(1)
    for kernel, eager in zip(
        results(divergence, student, teacher, triton=True), results(divergence, student, teacher), strict=True
    ):
        torch.testing.assert_close(kernel, eager, rtol=2e-5, atol=2e-5)
    assert calls


@interpreted
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3), JensenShannon(0.7)], ids=str)
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_errors_are_no_larger_than_the_eager_tiles_also_near_equality(divergence, distance):
    """Beside the eager tile in float64. Logits that differ by 0.001 have a JSD of about 10⁻⁷."""
    teacher, other = projected(1, torch.float64), projected(0, torch.float64)
    hidden = (teacher.hidden + distance * other.hidden).detach()
    expected = results(divergence, copied(hidden, teacher.head, torch.float64), teacher)
    single = copied(hidden, teacher.head, torch.float32), copied(teacher.hidden, teacher.head, torch.float32)
    errors = [
        [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
        for found in (results(divergence, *single, triton=True), results(divergence, *single))
    ]
    for kernel, eager in zip(*errors, strict=True):
        assert kernel < max(2 * eager, 1e-5), errors


def copied(hidden, head, dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in (hidden, *head.tensors().values())]
    return Projected(tensors[0], Head(tensors[1], tensors[2]))


@interpreted
@pytest.mark.parametrize(
    "transform", [Transform(scale=0.5), Transform(softcap=3.0), Transform(2.0, softcap=5.0)], ids=str
)
def test_scaled_and_soft_capped_logits(transform):
    student, teacher = projected(0, transform=transform), projected(1, transform=transform)
    for kernel, eager in zip(
        results(JensenShannon(0.5), student, teacher, triton=True),
        results(JensenShannon(0.5), student, teacher),
        strict=True,
    ):
        torch.testing.assert_close(kernel, eager, rtol=2e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.5)], ids=str)
def test_impossible_tokens_and_steep_distributions(divergence):
    """A token that is impossible for both, one for the teacher only, and probabilities that underflow."""
    student, teacher = projected(0, scale=15.0), projected(1, scale=15.0)
    with torch.no_grad():
        for head, impossible in ((student.head, [3]), (teacher.head, [3, 7])):
            head.tensors()["bias"][impossible] = -torch.inf
    kernel, eager = results(divergence, student, teacher, triton=True), results(divergence, student, teacher)
    torch.testing.assert_close(kernel[0], eager[0], rtol=1e-4, atol=1e-4)
    assert eager[0].isinf().any() == isinstance(divergence, ReverseKL), "where the student can choose it"
    for found, expected in zip(kernel[1:], eager[1:], strict=True):  # large where a token is impossible, and cancelling
        assert found.isfinite().all()
        assert (found - expected).norm() < 1e-4 * expected.norm() + 1e-5


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_kernel_compiles_for_a_gpu(kind):
    """To the machine code of an H100, with bfloat16 products; whether it is right there, only a GPU can say."""
    from understudy.fused_linear import triton_kernel as module

    names = module._kernel.arg_names
    pointers = {"student": "*bf16", "teacher": "*bf16", "weights": "*fp32", "values": "*fp32", "gradient": "*bf16"}
    constants = {name: 1.0 for name in names if name.isupper()}
    constants |= {"KIND": kind, "BETA_IS_SMALL": True, "STEEPEST": 1e4, "DIFFERENTIATE": True, "BLOCK": 2048}
    numbers = dict.fromkeys(("temperature", "factor", "beta", "scale"), "fp32")
    others = dict.fromkeys(names, "i32")
    signature = {**others, **numbers, **pointers, **dict.fromkeys(constants, "constexpr")}
    source = module.triton.compiler.ASTSource(module._kernel, signature, constants)
    target = module.triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "ptx" in module.triton.compile(source, target=target, options={"num_warps": module._WARPS}).asm


@interpreted
def test_bfloat16_products_are_computed_in_float32():
    student, teacher = projected(0, torch.bfloat16), projected(1, torch.bfloat16)
    for kernel, eager in zip(
        results(ReverseKL(), student, teacher, triton=True), results(ReverseKL(), student, teacher), strict=True
    ):
        torch.testing.assert_close(kernel, eager, rtol=1e-2, atol=1e-2)


@interpreted
def test_other_losses_are_computed_as_without_the_kernel(monkeypatch):
    calls = calls_of_the_kernel(monkeypatch)
    student, teacher = projected(0), projected(1)
    for kernel, eager in zip(
        results(TotalVariation(), student, teacher, triton=True),
        results(TotalVariation(), student, teacher),
        strict=True,
    ):
        assert torch.equal(kernel, eager)
    assert not calls
