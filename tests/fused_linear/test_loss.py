"""The chunked projection against autograd through the whole (N, V), and what it holds in memory."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, InternalTorchDynamoError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from understudy.divergences import AlphaBeta, ForwardKL, JensenShannon, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from understudy.fused_linear import loss as projection
from understudy.fused_linear import tiles as tile
from understudy.fused_linear.distributions import Dense, Projected, TopK
from understudy.fused_linear.head import Head, Transform
from understudy.fused_linear.loss import chosen_log_prob, divergence_loss, fused_divergence, row_values

N, V, D = 23, 31, 7
DIVERGENCES = [
    ForwardKL(),
    ReverseKL(temperature=2.0, rescale=True),
    JensenShannon(0.1),
    TotalVariation(),
    SkewKL(0.1),
    SkewReverseKL(0.1),
    AlphaBeta(0.2, 0.7),
]
TOP = [d for d in DIVERGENCES if d.temperature == 1.0] + [ReverseKL()]
f64 = torch.float64
names = repr
COMPILES = pytest.mark.skipif("TEST_COMPILED" not in os.environ, reason="takes minutes: set TEST_COMPILED=1")


@pytest.fixture(autouse=True)
def compiled_or_said():
    """What could not be compiled would be computed as it is, and a test of compiled code would prove nothing."""
    if "TEST_COMPILED" in os.environ:
        torch.compiler.reset()  # only so many variants of a function are kept
    yield
    assert tile._compiled._kernel is not tile._in_blocks
    assert tile._compiled_sum._kernel is not tile._sum_in_blocks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_source(
    width: int = D, seed: int = 0, dtype=f64, bias=True, scale=1.0, softcap=None, vocabulary=V
) -> Projected:
    g = generator(seed)
    hidden = torch.randn(N, width, generator=g, dtype=f64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g, dtype=f64).to(dtype)
    offset = torch.randn(vocabulary, generator=g, dtype=f64).to(dtype) if bias else None
    for leaf in (hidden, weight, offset):
        if leaf is not None:
            leaf.requires_grad_()
    return Projected(hidden, Head(weight, offset, Transform(scale, softcap)))


def leaves(source: Projected) -> list[Tensor]:
    return [x for x in (source.hidden, source.head.weight, source.head.bias) if x is not None]


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(projection, "rows_per_tile", lambda vocabulary: request.param)


def upstream(kind: str) -> tuple[Tensor | None, Tensor]:
    """The weights that are announced, and the ones that values are really weighted with."""
    true = torch.rand(N, generator=generator(9), dtype=f64) - 0.3
    return {
        "plain": (None, torch.ones(N, dtype=f64)),
        "scalar": (None, torch.full((N,), -0.37, dtype=f64)),
        "announced": (true, true),
        "a multiple": (true, 3.7 * true),
        "another": (true, true.roll(1)),
        "nearly a multiple": (true, 2 * true * (1 + 1e-5 * torch.arange(N))),
        "all zero": (torch.zeros(N, dtype=f64), true),
        "some zero": (true * (torch.arange(N) % 2), true * (torch.arange(N) % 2)),
        "wrongly zero": (true * (torch.arange(N) % 2), true),
        "nothing": (true, torch.zeros(N, dtype=f64)),
    }[kind]


UPSTREAMS = [
    "plain",
    "scalar",
    "announced",
    "a multiple",
    "another",
    "nearly a multiple",
    "all zero",
    "some zero",
    "wrongly zero",
    "nothing",
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
@pytest.mark.parametrize("kind", UPSTREAMS)
def test_value_and_gradients_equal_autograd_through_all_logits(divergence, kind, chunk):
    student, teacher = random_source(seed=1, scale=0.8, softcap=4.0), random_source(width=5, seed=2)
    announced, true = upstream(kind)
    values = row_values(student, divergence_loss(divergence, teacher), announced, divergence.temperature)
    expected = divergence(teacher.log_probs().detach(), student.log_probs())
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad((values * true).sum(), leaves(student), retain_graph=True)
    wanted = torch.autograd.grad((expected * true).sum(), leaves(student))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_log_probability_of_chosen_tokens_equals_autograd(chunk):
    student = random_source(bias=False, scale=0.5)
    tokens = torch.randint(V, (N,), generator=generator())
    true = upstream("another")[1]
    values = row_values(student, chosen_log_prob(tokens), None)
    expected = student.log_probs().gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad((values * true).sum(), leaves(student))
    for one, other in zip(found, torch.autograd.grad((expected * true).sum(), leaves(student)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chain_is_the_derivative_of_what_a_head_does_after_its_product(scale, softcap):
    source = random_source(scale=scale, softcap=softcap)
    product = (source.hidden @ source.head.weight.t() + source.head.bias).detach().requires_grad_()
    logits = product * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(source.head(source.hidden), logits)
    grad = torch.randn(N, V, generator=generator(), dtype=f64)
    torch.testing.assert_close(source.head.transform.chain(grad, logits), torch.autograd.grad(logits, product, grad)[0])


def test_only_gradients_that_are_asked_for_are_made(monkeypatch):
    student = random_source()
    student.head.weight.requires_grad_(False)
    student.head.bias.requires_grad_(False)
    made = []
    walk = projection._walk
    monkeypatch.setattr(projection, "_walk", lambda *a: made.append(walk(*a)) or made[-1])
    values = row_values(student, divergence_loss(ForwardKL(), random_source(seed=3)))
    values.sum().backward()
    [(_, (hidden, weight, bias))] = made
    assert hidden is not None
    assert weight is None
    assert bias is None
    with torch.no_grad():
        row_values(student, divergence_loss(ForwardKL(), random_source(seed=3)))
    assert made[1][1] == [None, None, None]


@pytest.mark.parametrize(("kind", "passes"), [("a multiple", 1), ("scalar", 1), ("another", 2), ("wrongly zero", 2)])
def test_a_second_pass_is_made_only_if_the_weights_were_not_those_announced(kind, passes, monkeypatch):
    student = random_source()
    made = []
    walk = projection._walk
    monkeypatch.setattr(projection, "_walk", lambda *a: made.append(a) or walk(*a))
    announced, true = upstream(kind)
    (row_values(student, divergence_loss(ForwardKL(), random_source(seed=3)), announced) * true).sum().backward()
    assert len(made) == passes


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("kind", ["announced", "another"])
@pytest.mark.parametrize("top", [False, True])
def test_no_tensor_over_all_rows_and_the_vocabulary_is_ever_made(kind, top, monkeypatch):
    rows, vocabulary, width, size = 300, 500, 4, 8
    monkeypatch.setattr(projection, "rows_per_tile", lambda vocabulary: size)
    student, teacher = (
        Projected(
            torch.randn(rows, width, requires_grad=True), Head(torch.randn(vocabulary, width, requires_grad=True))
        )
        for _ in range(2)
    )
    support = torch.arange(5).expand(rows, 5)
    source = TopK(torch.randn(rows, 5).log_softmax(-1) - 0.5, support) if top else teacher
    announced = torch.rand(rows)
    true = announced if kind == "announced" else announced.flip(0)
    with Largest() as largest:
        (row_values(student, divergence_loss(JensenShannon(0.5), source), announced) * true).sum().backward()
    assert size * vocabulary <= largest.size < rows * vocabulary / 10
    with Largest() as plain:
        student.log_probs()
    assert plain.size == rows * vocabulary


def test_two_tiles_fit_into_their_memory():
    for memory in (64.0, 256.0):
        with tile.tiling(memory):
            for vocabulary in (100, 32_000, 152_000, 262_144):
                rows = tile.chunk_rows(vocabulary)
                assert 16 <= rows <= 1024
                assert rows == 16 or rows * vocabulary * 4 * 2 <= memory * 2**20
            assert tile.chunk_rows(10**9) == 16
    assert tile.current() == tile.Tiling(), "the settings end with the block"


def test_only_long_runs_on_machines_with_a_compiler_are_compiled(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    assert tile.pays_to_compile(1e6, 50_000)
    assert not tile.pays_to_compile(1e5, 50_000)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not tile.pays_to_compile(1e6, 50_000)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not tile.pays_to_compile(1e6, 50_000)


def test_gradients_are_the_same_when_they_are_asked_for_again():
    student = random_source(seed=1)
    total = row_values(student, divergence_loss(ReverseKL(), random_source(seed=2))).sum()
    first = torch.autograd.grad(total, leaves(student), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for one, other in zip(torch.autograd.grad(2 * total, leaves(student)), kept, strict=True):
        torch.testing.assert_close(one, 2 * other, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))


# fused_divergence, for loops of one's own


def plain_sum(divergence, student, teacher, weights):
    values = divergence(teacher.log_probs().detach(), student.log_probs())
    return (values * weights).sum()


def fused_sum(divergence, student, teacher, weights, **options):
    return fused_divergence(
        divergence,
        student.hidden,
        student.head.weight,
        teacher.hidden,
        teacher.head.weight,
        bias=student.head.bias,
        teacher_bias=teacher.head.bias,
        row_weights=weights,
        **options,
    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES)])
@pytest.mark.parametrize("divergence", [replace(d, temperature=1.0) for d in DIVERGENCES], ids=names)
@pytest.mark.parametrize("masked", [False, True])
def test_fused_equals_plain(divergence, masked, compiled, chunk):
    """Weights of either sign, masked rows that hold nonsense, a teacher with a padded vocabulary, two temperatures."""
    student, teacher = random_source(seed=1), random_source(width=5, seed=2, vocabulary=V + 3)
    weights = torch.rand(N, generator=generator(9), dtype=f64) - 0.3
    if masked:
        weights[::3] = 0
        with torch.no_grad():
            student.hidden[::3] = torch.inf
    kept = weights != 0
    clean = [Projected(x.hidden.detach()[kept].requires_grad_(), x.head.cut(V)) for x in (student, teacher)]
    for temperature in (1.0, 1.7):
        softened = replace(divergence, temperature=temperature)
        expected = plain_sum(softened, *clean, weights[kept])
        wanted = torch.autograd.grad(-0.3 * expected, leaves(clean[0])[:1] + leaves(student)[1:])
        with tile.tiling(compiled=compiled):
            found = fused_sum(divergence, student, teacher, weights, temperature=temperature)
            grads = torch.autograd.grad(-0.3 * found, leaves(student))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[0][kept], wanted[0], rtol=1e-11, atol=1e-12)
        assert not grads[0][~kept].any()
        for one, other in zip(grads[1:], wanted[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@COMPILES
@pytest.mark.parametrize("kind", ["top k", "dense", "chosen"])
def test_compiled_rules_equal_the_plain_ones(kind):
    student, log_p = random_source(seed=1), random_source(seed=2).log_probs().detach()
    rules = {
        "top k": divergence_loss(JensenShannon(0.3), top_k(log_p, 5)),
        "dense": divergence_loss(JensenShannon(0.3), Dense(log_p)),
        "chosen": chosen_log_prob(torch.randint(V, (N,), generator=generator())),
    }[kind]
    found = []
    for compiled in (False, True):
        with tile.tiling(compiled=compiled):
            values = row_values(student, rules)
            found.append([values, *torch.autograd.grad(values.sum(), leaves(student))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("error", [InternalTorchDynamoError, FailOnRecompileLimitHit])
@pytest.mark.parametrize("piece", ["_compiled", "_compiled_sum"])
def test_what_cannot_be_compiled_is_computed_all_the_same(piece, error, monkeypatch, caplog, chunk):
    def broken(*_):
        raise error("no such thing as a compiler")

    for each in (tile._compiled, tile._compiled_sum):
        monkeypatch.setattr(each, "_kernel", each._instead)
    monkeypatch.setattr(getattr(tile, piece), "_kernel", broken)
    student, teacher = random_source(seed=1), random_source(seed=2)
    expected = plain_sum(ForwardKL(), student, teacher, 1.0)
    for _ in range(2):
        with tile.tiling(compiled=True):
            torch.testing.assert_close(fused_sum(ForwardKL(), student, teacher, None), expected)
    assert caplog.text.count("no such thing as a compiler") == 1


def test_fused_gradients_add_up_over_micro_batches():
    student, teacher = random_source(seed=1), random_source(seed=2)
    weights = torch.rand(N, generator=generator(9), dtype=f64)
    (whole,) = torch.autograd.grad(fused_sum(ReverseKL(), student, teacher, weights), [student.head.weight])
    for rows in (slice(0, 7), slice(7, N)):
        parts = [Projected(x.hidden[rows], x.head) for x in (student, teacher)]
        fused_sum(ReverseKL(), *parts, weights[rows]).backward()
    torch.testing.assert_close(student.head.weight.grad, whole, rtol=1e-12, atol=1e-13)


def test_fused_gradients_reach_adapters_of_a_head():
    """As LoRA has it: the head is a frozen matrix plus a product of two small ones."""
    student, teacher = random_source(seed=1, bias=False), random_source(seed=2)
    frozen = student.head.weight.detach()
    low, high = (
        torch.randn(*shape, generator=generator(), dtype=f64, requires_grad=True) for shape in ((V, 2), (2, D))
    )
    lora = Projected(student.hidden, Head(frozen + low @ high))
    found = torch.autograd.grad(fused_sum(JensenShannon(), lora, teacher, None), [low, high], retain_graph=True)
    wanted = torch.autograd.grad(plain_sum(JensenShannon(), lora, teacher, 1.0), [low, high])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_fused_divergence_of_a_frozen_head_makes_three_products():
    student, teacher = random_source(seed=1, bias=False), random_source(seed=2, bias=False)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    for frozen, expected in ((False, 4), (True, 3)):
        student.head.weight.requires_grad_(not frozen)
        with Products() as products:
            fused_sum(ForwardKL(), student, teacher, None).backward()
        assert products.count == expected


def test_fused_divergence_of_no_rows_is_nothing():
    student, teacher = random_source(), random_source(seed=2)
    total = fused_sum(ForwardKL(), student, teacher, torch.zeros(N))
    total.backward()
    assert total == 0
    assert not any(leaf.grad.any() for leaf in leaves(student))


def test_fused_products_follow_autocast():
    student, teacher = (random_source(seed=seed, dtype=torch.float32, bias=False) for seed in (1, 2))
    exact = fused_sum(ForwardKL(), student, teacher, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fused_sum(ForwardKL(), student, teacher, None)
    rounded.backward()
    assert rounded.dtype == student.head.weight.grad.dtype == torch.float32
    assert 1e-6 < abs(rounded / exact - 1) < 0.02


def test_fused_divergence_refuses_what_does_not_belong_together():
    student, teacher = random_source(bias=False), random_source(width=5)
    with pytest.raises(ValueError, match=r"the teacher's hidden rows \(23, 7\) and head \(31, 5\)"):
        fused_divergence(ForwardKL(), student.hidden, student.head.weight, student.hidden, teacher.head.weight)
    with pytest.raises(ValueError, match="23 rows of the student meet 22"):
        fused_divergence(ForwardKL(), *leaves(student), teacher.hidden[1:], teacher.head.weight)
    with pytest.raises(ValueError, match="not twice"):
        fused_sum(ForwardKL(temperature=2.0), student, teacher, None, temperature=2.0)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_as_near_to_the_truth_as_autograd_is(dtype):
    student, teacher = random_source(seed=1, dtype=dtype), random_source(seed=2, dtype=dtype)
    weights = torch.rand(N, generator=generator()) / 500
    rounded = Projected(
        *(x.detach().double().requires_grad_() for x in leaves(student)[:1]),
        Head(*(x.detach().double().requires_grad_() for x in leaves(student)[1:])),
    )
    exact = ForwardKL()(teacher.log_probs().double().detach(), rounded.log_probs())
    wanted = torch.autograd.grad((exact * weights).sum() / 37, leaves(rounded))
    plain = torch.autograd.grad(
        (ForwardKL()(teacher.log_probs(), student.log_probs()) * weights).sum() / 37, leaves(student)
    )
    values = row_values(student, divergence_loss(ForwardKL(), teacher), weights)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=0.02, atol=0.02)
    found = torch.autograd.grad((values * weights).sum() / 37, leaves(student))
    for one, other, truth in zip(found, plain, wanted, strict=True):
        assert one.dtype == dtype
        off, autograd_off = ((x.double() - truth).norm() / truth.norm() for x in (one, other))
        assert off < 2 * autograd_off
        assert off < 0.02


def test_the_common_factor_of_half_precision_gradients_is_not_rounded():
    student, teacher = random_source(seed=1, dtype=torch.bfloat16), random_source(seed=2, dtype=torch.bfloat16)
    (one,) = torch.autograd.grad(row_values(student, divergence_loss(ForwardKL(), teacher)).sum(), student.hidden)
    values = row_values(student, divergence_loss(ForwardKL(), teacher))
    (found,) = torch.autograd.grad(values.sum() * 1.00586, student.hidden)  # three quarters of a step of bfloat16
    assert torch.equal(found, (one.double() * 1.00586).bfloat16())
    assert not torch.equal(found, one * torch.tensor(1.00586).bfloat16())


def test_a_loss_scale_beyond_float16_does_not_overflow():
    student, teacher = random_source(seed=1, dtype=torch.float16), random_source(seed=2, dtype=torch.float16)
    weights = torch.full((N,), 1 / 512)
    values = row_values(student, divergence_loss(ForwardKL(), teacher), weights)
    (grad,) = torch.autograd.grad((values * weights).sum() * 131072 / 64, student.hidden)
    (wanted,) = torch.autograd.grad(
        row_values(student, divergence_loss(ForwardKL(), teacher)).sum() * 4, student.hidden
    )
    torch.testing.assert_close(grad, wanted, rtol=2e-3, atol=1e-4)


def test_hidden_rows_wider_than_the_head_are_narrowed_and_their_gradient_widened():
    student = random_source(seed=1, dtype=torch.bfloat16)
    wide = Projected(student.hidden.detach().float().requires_grad_(), student.head)
    rule = divergence_loss(ForwardKL(), random_source(seed=2))
    (grad,) = torch.autograd.grad(row_values(wide, rule).sum(), wide.hidden)
    (expected,) = torch.autograd.grad(row_values(student, rule).sum(), student.hidden)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, expected.float())


# Sources


def test_dense_is_cut_by_renormalising():
    values = torch.randn(N, V, generator=generator(), dtype=f64).log_softmax(-1)
    cut = Dense(values).cut(10)
    torch.testing.assert_close(cut.values, values[:, :10].log_softmax(-1))
    assert Dense(values).cut(V).values is values
    head = random_source().head
    assert head.cut(V) is head
    assert head.cut(10).bias.shape == (10,)


def top_k(log_p: Tensor, k: int) -> TopK:
    return TopK(*log_p.topk(k, dim=-1))


def merged(log_p: Tensor, support: Tensor) -> Tensor:
    """K+1 events, written with probabilities."""
    p = log_p.exp()
    known = p.gather(-1, support)
    outside = torch.ones_like(p).scatter(-1, support, 0)
    return torch.cat([known, (p * outside).sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("divergence", TOP, ids=names)
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_top_k_teacher_is_a_full_teacher_over_merged_events(divergence, k, chunk):
    student = random_source(seed=1)
    log_p = random_source(seed=2).log_probs().detach()
    teacher = top_k(log_p, k)
    expected = divergence(merged(log_p, teacher.support), merged(student.log_probs(), teacher.support))
    values = row_values(student, divergence_loss(divergence, teacher))
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    true = upstream("another")[1]
    found = torch.autograd.grad((values * true).sum(), leaves(student))
    for one, other in zip(found, torch.autograd.grad((expected * true).sum(), leaves(student)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("divergence", [d for d in TOP if not isinstance(d, AlphaBeta)], ids=names)
def test_knowing_more_tokens_never_lowers_a_divergence_and_ends_at_the_full_one(divergence):
    student = random_source(seed=1)
    log_p = random_source(seed=2).log_probs().detach()
    full = divergence(log_p, student.log_probs())
    before = torch.zeros_like(full)
    for k in range(1, V + 1):
        value = row_values(student, divergence_loss(divergence, top_k(log_p, k)))
        assert (value >= before - 1e-12).all()
        assert (value <= full + 1e-12).all()
        before = value
    torch.testing.assert_close(before, full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("divergence", TOP, ids=names)
def test_a_support_of_the_whole_vocabulary_is_the_full_teacher(divergence, dtype):
    student = random_source(seed=1, dtype=dtype)
    log_p = random_source(seed=2, dtype=dtype).log_probs().detach()
    teacher = top_k(log_p, V)
    plain = divergence(teacher.log_probs(), teacher.merge(student.log_probs()))
    expected = divergence(log_p, student.log_probs())
    wanted = torch.autograd.grad(expected.sum(), leaves(student))
    for values in (row_values(student, divergence_loss(divergence, teacher)), plain):
        # the αβ family's powers below 1 lift the remaining event's rounding
        near = 2e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=near)
        for one, other in zip(torch.autograd.grad(values.sum(), leaves(student)), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=10 * near)


def test_top_k_of_a_confident_teacher_does_not_punish_the_student_for_rounding():
    log_p = torch.tensor([[-1e-9, -21.0, -22.0]])  # in float32 nothing is left for any other token
    log_q = torch.tensor([[0.9, 0.05, 0.05]]).log()
    teacher = TopK(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))
    value = ReverseKL()(teacher.log_probs(), teacher.merge(log_q))
    assert value < ReverseKL()(log_p, log_q) + 0.1


def test_top_k_teachers_cannot_be_softened():
    with pytest.raises(ValueError, match="cannot be softened"):
        top_k(torch.zeros(1, 4).log_softmax(-1), 2).log_probs(temperature=2.0)


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
    peaks = [
        float(subprocess.run([sys.executable, "-c", _PEAK, rows], capture_output=True, text=True, check=True).stdout)
        for rows in ("256", "2048")
    ]
    assert max(peaks) < 100
    assert peaks[1] - peaks[0] < 20
