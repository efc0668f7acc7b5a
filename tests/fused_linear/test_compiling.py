"""Compiled code: when it pays off, when a caller's own loop switches to it, its results, and where nothing compiles."""

import pytest
import torch
from projected import COMPILES, N, V, generator, leaves, random_projected, top_k
from torch._dynamo.exc import FailOnRecompileLimitHit, InternalTorchDynamoError

from understudy.divergences import ForwardKL, JensenShannon, ReverseKL
from understudy.fused_linear import compiling, kernel
from understudy.fused_linear.compiling import compiling_pays_off
from understudy.fused_linear.distributions import Dense
from understudy.fused_linear.loss import chosen_log_prob, divergence_loss, fused_divergence, row_values
from understudy.fused_linear.tiles import tiling


def test_only_long_runs_on_machines_with_a_compiler_are_compiled(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    assert compiling_pays_off(1e6, 50_000)
    assert not compiling_pays_off(1e5, 50_000)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiling_pays_off(1e6, 50_000)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not compiling_pays_off(1e6, 50_000)


@pytest.fixture
def kinds(monkeypatch):
    """Which calls of `fused_divergence` were compiled, in a process where 100 rows of 8 tokens are a long run."""
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(compiling, "_LONG_RUN", 100 * 8)
    monkeypatch.setattr(compiling, "_computed", type(compiling._computed)())
    used = []
    for name, compiled in (("_block_by_block", False), ("_compiled_kernel", True)):
        monkeypatch.setattr(
            kernel, name, lambda *args, compiled=compiled: used.append(compiled) or kernel._kernel(*args)
        )
    return used


JSD = JensenShannon(0.5)


def call(divergence=JSD, dtype=torch.float32, rows=40):
    tensors = [torch.randn(n, 4, dtype=dtype, generator=generator()) for n in (rows, 8, rows, 8)]
    fused_divergence(divergence, *tensors[:2], *(x.requires_grad_() for x in tensors[2:])).backward()


def test_a_loop_of_the_callers_own_is_compiled_once_it_has_computed_as_much_as_a_long_run(kinds, caplog):
    caplog.set_level("INFO")
    for _ in range(5):
        call()
    assert kinds == [False, False, False, True, True], "100 rows are exceeded by the third call"
    assert caplog.text.count("its kernel is compiled from the next call on") == 1
    assert "tiling(compiled=False)" in caplog.text


def test_each_divergence_and_dtype_is_counted_for_itself(kinds):
    for _ in range(3):
        call()
    call(JensenShannon(0.4))
    call(dtype=torch.float64)
    assert kinds == [False] * 5
    call(rows=3)
    assert kinds[-1], "the number of rows does not matter: one kernel is compiled for all of them"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_that_says_whether_it_is_compiled_is_never_switched(compiled, kinds):
    with tiling(compiled=compiled):
        for _ in range(5):
            call()
    assert kinds == [compiled] * 5


def test_nothing_is_switched_where_torch_compile_is_disabled(kinds, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    for _ in range(5):
        call()
    assert not any(kinds)


@COMPILES
@pytest.mark.parametrize("kind", ["top k", "dense", "chosen"])
@pytest.mark.parametrize("weights", [torch.ones(N), None], ids=["announced", "late"])
def test_compiled_row_losses_equal_the_plain_ones(weights, kind):
    student, log_p = random_projected(seed=1), random_projected(seed=2).log_probs().detach()
    row_losses = {
        "top k": divergence_loss(JensenShannon(0.3), top_k(log_p, 5)),
        "dense": divergence_loss(JensenShannon(0.3), Dense(log_p)),
        "chosen": chosen_log_prob(torch.randint(V, (N,), generator=generator())),
    }[kind]
    results = []
    for compiled in (False, True):
        with tiling(compiled=compiled):
            values = row_values(student, row_losses, weights)
            results.append([values, *torch.autograd.grad(values.sum(), leaves(student))])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-12)


@COMPILES
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3), JensenShannon(0.7)], ids=str)
def test_a_tile_is_compiled_as_one_loop_over_rows_whose_intermediate_results_are_one_row(divergence):
    from torch._inductor import config, metrics

    metrics.reset()
    tensors = [torch.randn(n, 4, generator=generator()) for n in (40, 500, 40, 500)]
    with tiling(compiled=True), config.patch(force_disable_caches=True):
        fused_divergence(divergence, *tensors[:2], *(x.requires_grad_() for x in tensors[2:])).backward()
    [loop] = metrics.cpp_outer_loop_fused_inner_counts
    assert loop.local_buffer_number >= 2, "the exponentials of student and teacher"


@pytest.mark.parametrize("error", [InternalTorchDynamoError, FailOnRecompileLimitHit])
def test_where_compiling_fails_the_fallback_runs_and_one_warning_is_logged(error, monkeypatch, caplog, tile_rows):
    def fail(*_):
        raise error("no such thing as a compiler")

    monkeypatch.setattr(kernel._compiled_kernel, "_kernel", fail)
    student, teacher = random_projected(seed=1), random_projected(seed=2)
    expected = ForwardKL()(teacher.log_probs().detach(), student.log_probs())
    for _ in range(2):
        with tiling(compiled=True):
            values = row_values(student, divergence_loss(ForwardKL(), teacher), torch.ones(N))
            torch.testing.assert_close(values, expected)
    assert caplog.text.count("no such thing as a compiler") == 1
