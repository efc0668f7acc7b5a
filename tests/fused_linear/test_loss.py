"""Fused linear losses against autograd through all (N, V) logits, and the memory and matrix products they take."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operations import LargestTensor, VocabularyProducts
from projected import COMPILES, DIVERGENCES, D, N, V, f64, generator, leaves, random_projected
from torch import Tensor

from understudy.divergences import ForwardKL, JensenShannon, ReverseKL
from understudy.fused_linear import loss as fused_loss
from understudy.fused_linear.distributions import Projected
from understudy.fused_linear.head import Head
from understudy.fused_linear.loss import chosen_log_prob, divergence_loss, fused_divergence, row_values
from understudy.fused_linear.merged import TopK
from understudy.fused_linear.tiles import tiling


def upstream(kind: str) -> tuple[Tensor | None, Tensor]:
    """The weights passed to the forward pass, and those with which the values are summed afterwards."""
    true = torch.rand(N, generator=generator(9), dtype=f64) - 0.3
    ones = torch.ones(N, dtype=f64)
    return {
        "plain": (ones, ones),
        "scalar": (ones, torch.full((N,), -0.37, dtype=f64)),
        "late": (None, true),
        "late and constant": (None, 2 * ones),
        "late and zero": (None, 0 * ones),
        "announced": (true, true),
        "a multiple": (true, 3.7 * true),
        "different": (true, true.roll(1)),
        "nearly a multiple": (true, 2 * true * (1 + 1e-5 * torch.arange(N))),
        "all zero": (torch.zeros(N, dtype=f64), true),
        "some zero": (true * (torch.arange(N) % 2), true * (torch.arange(N) % 2)),
        "wrongly zero": (true * (torch.arange(N) % 2), true),
        "zero afterwards": (true, torch.zeros(N, dtype=f64)),
    }[kind]


UPSTREAMS = [
    "plain",
    "scalar",
    "late",
    "late and constant",
    "late and zero",
    "announced",
    "a multiple",
    "different",
    "nearly a multiple",
    "all zero",
    "some zero",
    "wrongly zero",
    "zero afterwards",
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("kind", UPSTREAMS)
def test_values_and_gradients_equal_autograd_through_all_logits(divergence, kind, tile_rows):
    student, teacher = random_projected(seed=1, scale=0.8, softcap=4.0), random_projected(width=5, seed=2)
    announced, true = upstream(kind)
    values = row_values(student, divergence_loss(divergence, teacher), announced, divergence.temperature)
    expected = divergence(teacher.log_probs().detach(), student.log_probs())
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    grads = torch.autograd.grad((values * true).sum(), leaves(student), retain_graph=True)
    expected_grads = torch.autograd.grad((expected * true).sum(), leaves(student))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
    assert all(leaf.grad is None for leaf in leaves(teacher))


@pytest.mark.parametrize("weights", [torch.ones(N, dtype=f64), None], ids=["announced", "late"])
def test_log_probabilities_of_chosen_tokens_equal_autograd(weights, tile_rows):
    student = random_projected(bias=False, scale=0.5)
    tokens = torch.randint(V, (N,), generator=generator())
    true = upstream("different")[1]
    values = row_values(student, chosen_log_prob(tokens), weights)
    expected = student.log_probs().gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad((values * true).sum(), leaves(student))
    expected_grads = torch.autograd.grad((expected * true).sum(), leaves(student))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    student = random_projected()
    student.head.weight.requires_grad_(False)
    student.head.bias.requires_grad_(False)
    results = []
    run_tiles = fused_loss._run_tiles
    monkeypatch.setattr(fused_loss, "_run_tiles", lambda *a: results.append(run_tiles(*a)) or results[-1])
    values = row_values(student, divergence_loss(ForwardKL(), random_projected(seed=3)), torch.ones(N))
    values.sum().backward()
    [(_, (hidden, weight, bias))] = results
    assert hidden is not None
    assert weight is None
    assert bias is None
    with torch.no_grad():
        row_values(student, divergence_loss(ForwardKL(), random_projected(seed=3)), torch.ones(N))
    assert results[1][1] == [None, None, None]


@pytest.mark.parametrize(
    ("kind", "passes"), [("a multiple", 1), ("scalar", 1), ("different", 2), ("wrongly zero", 2), ("late", 1)]
)
def test_a_second_pass_with_gradients_runs_only_if_the_weights_differ_from_those_announced(kind, passes, monkeypatch):
    student = random_projected()
    passes_with_gradients = []
    run_tiles = fused_loss._run_tiles
    monkeypatch.setattr(fused_loss, "_run_tiles", lambda *a: passes_with_gradients.append(any(a[-1])) or run_tiles(*a))
    announced, true = upstream(kind)
    (row_values(student, divergence_loss(ForwardKL(), random_projected(seed=3)), announced) * true).sum().backward()
    assert sum(passes_with_gradients) == passes


@pytest.mark.parametrize("rows", [6, 100])
@pytest.mark.parametrize(
    ("kind", "chosen_products", "divergence_products"),
    [("announced", 3, 4), ("a multiple", 3, 4), ("late", 4, 6), ("different", 6, 8)],
)
def test_matrix_products_over_the_vocabulary(kind, chosen_products, divergence_products, rows, monkeypatch):
    """Per tile. With late weights the forward pass projects and the backward pass projects again and differentiates:
    no gradient is computed that is not used.
    """
    monkeypatch.setattr(fused_loss, "rows_per_tile", lambda vocabulary, device: rows)
    student, teacher = random_projected(seed=1, bias=False), random_projected(width=5, seed=2, bias=False)
    announced, true = upstream(kind)
    chosen = chosen_log_prob(torch.randint(V, (N,), generator=generator()))
    for row_losses, expected in (
        (chosen, chosen_products),
        (divergence_loss(ForwardKL(), teacher), divergence_products),
    ):
        with VocabularyProducts(V) as products:
            (row_values(student, row_losses, announced) * true).sum().backward()
        assert products.count == expected * -(-N // rows)


@pytest.mark.parametrize("kind", ["announced", "different", "late"])
@pytest.mark.parametrize("top", [False, True], ids=["full", "top k"])
def test_no_tensor_has_the_vocabulary_for_all_rows(kind, top, monkeypatch):
    rows, vocabulary, width, size = 300, 500, 4, 8
    monkeypatch.setattr(fused_loss, "rows_per_tile", lambda vocabulary, device: size)
    student, teacher = (
        Projected(
            torch.randn(rows, width, requires_grad=True), Head(torch.randn(vocabulary, width, requires_grad=True))
        )
        for _ in range(2)
    )
    support = torch.arange(5).expand(rows, 5)
    distribution = TopK(torch.randn(rows, 5).log_softmax(-1) - 0.5, support) if top else teacher
    true = torch.rand(rows)
    announced = {"announced": true, "different": true.flip(0), "late": None}[kind]
    with LargestTensor() as largest:
        (row_values(student, divergence_loss(JensenShannon(0.5), distribution), announced) * true).sum().backward()
    assert size * vocabulary <= largest.size < rows * vocabulary / 10
    with LargestTensor() as plain:
        student.log_probs()
    assert plain.size == rows * vocabulary


@pytest.mark.parametrize("weights", [torch.ones(N), None], ids=["announced", "late"])
def test_gradients_are_the_same_in_a_second_backward_pass(weights):
    student = random_projected(seed=1)
    total = row_values(student, divergence_loss(ReverseKL(), random_projected(seed=2)), weights).sum()
    first = torch.autograd.grad(total, leaves(student), retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad, copy in zip(torch.autograd.grad(2 * total, leaves(student)), copies, strict=True):
        torch.testing.assert_close(grad, 2 * copy, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(grad, copy) for grad, copy in zip(first, copies, strict=True))


# fused_divergence


def plain_sum(divergence, teacher, student, weights):
    values = divergence(teacher.log_probs().detach(), student.log_probs())
    return (values * weights).sum()


def fused_sum(divergence, teacher, student, weights, **options):
    return fused_divergence(
        divergence,
        teacher.hidden,
        teacher.head.weight,
        student.hidden,
        student.head.weight,
        teacher_bias=teacher.head.bias,
        bias=student.head.bias,
        row_weights=weights,
        **options,
    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES)])
@pytest.mark.parametrize("divergence", [replace(d, temperature=1.0) for d in DIVERGENCES], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_fused_equals_plain(divergence, masked, compiled, tile_rows):
    """Weights of either sign, masked rows that are infinite, a teacher with a padded vocabulary, two temperatures."""
    student, teacher = random_projected(seed=1), random_projected(width=5, seed=2, vocabulary=V + 3)
    weights = torch.rand(N, generator=generator(9), dtype=f64) - 0.3
    if masked:
        weights[::3] = 0
        with torch.no_grad():
            student.hidden[::3] = torch.inf
    nonzero = weights != 0
    clean = [Projected(x.hidden.detach()[nonzero].requires_grad_(), x.head.cut(V)) for x in (teacher, student)]
    for temperature in (1.0, 1.7):
        softened = replace(divergence, temperature=temperature)
        expected = plain_sum(softened, *clean, weights[nonzero])
        expected_grads = torch.autograd.grad(-0.3 * expected, leaves(clean[1])[:1] + leaves(student)[1:])
        with tiling(compiled=compiled):
            total = fused_sum(divergence, teacher, student, weights, temperature=temperature)
            grads = torch.autograd.grad(-0.3 * total, leaves(student))
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[0][nonzero], expected_grads[0], rtol=1e-11, atol=1e-12)
        assert not grads[0][~nonzero].any()
        for grad, expected_grad in zip(grads[1:], expected_grads[1:], strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


def test_fused_gradients_add_up_over_micro_batches():
    student, teacher = random_projected(seed=1), random_projected(seed=2)
    weights = torch.rand(N, generator=generator(9), dtype=f64)
    (expected,) = torch.autograd.grad(fused_sum(ReverseKL(), teacher, student, weights), [student.head.weight])
    for rows in (slice(0, 7), slice(7, N)):
        parts = [Projected(x.hidden[rows], x.head) for x in (teacher, student)]
        fused_sum(ReverseKL(), *parts, weights[rows]).backward()
    torch.testing.assert_close(student.head.weight.grad, expected, rtol=1e-12, atol=1e-13)


def test_fused_gradients_reach_adapters_of_a_head():
    """As in LoRA, the head is a frozen matrix plus a product of two small ones."""
    student, teacher = random_projected(seed=1, bias=False), random_projected(seed=2)
    frozen = student.head.weight.detach()
    low, high = (
        torch.randn(*shape, generator=generator(), dtype=f64, requires_grad=True) for shape in ((V, 2), (2, D))
    )
    lora = Projected(student.hidden, Head(frozen + low @ high))
    grads = torch.autograd.grad(fused_sum(JensenShannon(), teacher, lora, None), [low, high], retain_graph=True)
    expected_grads = torch.autograd.grad(plain_sum(JensenShannon(), teacher, lora, 1.0), [low, high])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


def test_fused_divergence_takes_four_products_and_three_for_a_frozen_head():
    student, teacher = random_projected(seed=1, bias=False), random_projected(seed=2, bias=False)

    for frozen, expected in ((False, 4), (True, 3)):
        student.head.weight.requires_grad_(not frozen)
        with VocabularyProducts(V) as products:
            fused_sum(ForwardKL(), teacher, student, None).backward()
        assert products.count == expected


def test_fused_divergence_of_no_rows_is_zero():
    student, teacher = random_projected(), random_projected(seed=2)
    total = fused_sum(ForwardKL(), teacher, student, torch.zeros(N))
    total.backward()
    assert total == 0
    assert not any(leaf.grad.any() for leaf in leaves(student))


def test_fused_products_follow_autocast():
    student, teacher = (random_projected(seed=seed, dtype=torch.float32, bias=False) for seed in (1, 2))
    exact = fused_sum(ForwardKL(), teacher, student, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fused_sum(ForwardKL(), teacher, student, None)
    rounded.backward()
    assert rounded.dtype == student.head.weight.grad.dtype == torch.float32
    assert 1e-6 < abs(rounded / exact - 1) < 0.02


def test_fused_divergence_refuses_shapes_that_do_not_match_and_two_temperatures():
    student, teacher = random_projected(bias=False), random_projected(width=5)
    with pytest.raises(ValueError, match=r"the teacher's hidden rows \(23, 7\) and head \(31, 5\)"):
        fused_divergence(ForwardKL(), student.hidden, teacher.head.weight, *leaves(student))
    with pytest.raises(ValueError, match="the student has 23 hidden rows and the teacher 22"):
        fused_divergence(ForwardKL(), teacher.hidden[1:], teacher.head.weight, *leaves(student))
    with pytest.raises(ValueError, match="not twice"):
        fused_sum(ForwardKL(temperature=2.0), teacher, student, None, temperature=2.0)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_as_accurate_as_autograd(dtype):
    student, teacher = random_projected(seed=1, dtype=dtype), random_projected(seed=2, dtype=dtype)
    weights = torch.rand(N, generator=generator()) / 500
    rounded = Projected(
        *(x.detach().double().requires_grad_() for x in leaves(student)[:1]),
        Head(*(x.detach().double().requires_grad_() for x in leaves(student)[1:])),
    )
    exact = ForwardKL()(teacher.log_probs().double().detach(), rounded.log_probs())
    expected_grads = torch.autograd.grad((exact * weights).sum() / 37, leaves(rounded))
    plain_grads = torch.autograd.grad(
        (ForwardKL()(teacher.log_probs(), student.log_probs()) * weights).sum() / 37, leaves(student)
    )
    values = row_values(student, divergence_loss(ForwardKL(), teacher), weights)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad((values * weights).sum() / 37, leaves(student))
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        error, plain_error = ((x.double() - exact_grad).norm() / exact_grad.norm() for x in (grad, plain_grad))
        assert error < 2 * plain_error
        assert error < 0.02


def test_the_common_factor_of_half_precision_gradients_is_not_rounded():
    student, teacher = random_projected(seed=1, dtype=torch.bfloat16), random_projected(seed=2, dtype=torch.bfloat16)
    ones = torch.ones(N)
    values = row_values(student, divergence_loss(ForwardKL(), teacher), ones)
    (grad,) = torch.autograd.grad(values.sum(), student.hidden)
    values = row_values(student, divergence_loss(ForwardKL(), teacher), ones)
    (multiple,) = torch.autograd.grad(values.sum() * 1.00586, student.hidden)  # three quarters of a step of bfloat16
    assert torch.equal(multiple, (grad.double() * 1.00586).bfloat16())
    assert not torch.equal(multiple, grad * torch.tensor(1.00586).bfloat16())


def test_a_loss_scale_beyond_float16_does_not_overflow():
    student, teacher = random_projected(seed=1, dtype=torch.float16), random_projected(seed=2, dtype=torch.float16)
    weights = torch.full((N,), 1 / 512)
    values = row_values(student, divergence_loss(ForwardKL(), teacher), weights)
    (grad,) = torch.autograd.grad((values * weights).sum() * 131072 / 64, student.hidden)
    unscaled = row_values(student, divergence_loss(ForwardKL(), teacher), torch.ones(N))
    (expected,) = torch.autograd.grad(unscaled.sum() * 4, student.hidden)
    torch.testing.assert_close(grad, expected, rtol=2e-3, atol=1e-4)


def test_hidden_rows_are_cast_to_the_dtype_of_the_head_and_their_gradient_back():
    student = random_projected(seed=1, dtype=torch.bfloat16)
    wide = Projected(student.hidden.detach().float().requires_grad_(), student.head)
    row_losses = divergence_loss(ForwardKL(), random_projected(seed=2))
    (grad,) = torch.autograd.grad(row_values(wide, row_losses, torch.ones(N)).sum(), wide.hidden)
    (expected,) = torch.autograd.grad(row_values(student, row_losses, torch.ones(N)).sum(), student.hidden)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, expected.float())


_PEAK = """
import sys
from pathlib import Path
import torch
from understudy import JensenShannon, fused_divergence

def memory(field):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024

def task(rows):
    tensors = [torch.randn(size, 16) for size in (rows, 30_000, rows, 30_000)]
    fused_divergence(JensenShannon(0.5), *(x.requires_grad_() for x in tensors), memory_mb=32).backward()

task(64)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
task(int(sys.argv[1]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the operating system does not tell the peak")
def test_peak_memory_does_not_grow_with_the_rows():
    """As the operating system counts it, in a process of its own; 2,048 rows of logits alone would be 234 MB."""
    # The C library's threshold stays where it is put, so that every tile is given back when it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    peaks = []
    for rows in ("256", "2048"):
        command = [sys.executable, "-c", _PEAK, rows]
        peaks.append(float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))
    assert max(peaks) < 100
    assert peaks[1] - peaks[0] < 20
