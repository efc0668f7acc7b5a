"""Every divergence against closed forms written independently, its properties, its limits and its derivative."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from understudy.divergences import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SIZES = [2, 3, 50, 1000]
INF = torch.inf


# Independent formulas, on probabilities and not on their logarithms, that numpy and torch both understand.


def kl(p, q, log):
    return (p * (log(p) - log(q))).sum(-1)


def jsd(p, q, log, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m, log) + (1 - beta) * kl(q, m, log)


def alpha_beta(p, q, log, a, b):
    if a == 0 and b == 0:
        return 0.5 * ((log(p) - log(q)) ** 2).sum(-1)
    if a == 0:
        return alpha_beta(q, p, log, b, a)
    if b == 0:
        return (p**a * log(p**a / q**a) - p**a + q**a).sum(-1) / a**2
    if a + b == 0:
        return (log(q**a / p**a) + (p / q) ** a - 1).sum(-1) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


FORMULAS = {
    ForwardKL(): kl,
    ReverseKL(): lambda p, q, log: kl(q, p, log),
    TotalVariation(): lambda p, q, log: 0.5 * abs(p - q).sum(-1),
    **{JensenShannon(b): (lambda p, q, log, b=b: jsd(p, q, log, b)) for b in (0.01, 0.1, 0.5, 0.9, 0.99)},
    JensenShannon(0): kl,
    JensenShannon(1): lambda p, q, log: kl(q, p, log),
    JensenShannon(0.3, normalized=True): lambda p, q, log: jsd(p, q, log, 0.3) / 0.21,
    **{SkewKL(a): (lambda p, q, log, a=a: kl(p, a * p + (1 - a) * q, log)) for a in (0.0, 0.1, 0.7, 1.0)},
    **{SkewReverseKL(a): (lambda p, q, log, a=a: kl(q, (1 - a) * p + a * q, log)) for a in (0.0, 0.1, 0.7, 1.0)},
    **{
        AlphaBeta(a, b): (lambda p, q, log, a=a, b=b: alpha_beta(p, q, log, a, b))
        for a, b in [
            (0.5, 0.5),
            (0.2, 0.7),
            (0.7, 0.2),
            (1.0, 1.0),
            (2.0, -1.0),
            (-1.0, 2.0),
            (0.3, -0.8),
            (1.0, 0.0),
            (0.6, 0.0),
            (0.0, 1.0),
            (0.0, 0.5),
            (0.6, -0.6),
            (0.0, 0.0),
        ]
    },
}
ALL = list(FORMULAS)
BOUNDED = [d for d in ALL if isinstance(d, TotalVariation | SkewKL | SkewReverseKL | JensenShannon)]
BOUNDED = [d for d in BOUNDED if getattr(d, "alpha", 1) > 0 and getattr(d, "beta", 0.5) not in (0, 1)]


def name(divergence: object) -> str:
    return repr(divergence).replace("temperature=1.0, rescale=False", "").replace("(, ", "(")


every = pytest.mark.parametrize("divergence", ALL, ids=name)


def random_pair(size: int, rows: int = 6, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + size)
    z = spread * torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    log_p, log_q = z.log_softmax(-1)
    return log_p, log_q


def gradient(divergence: Divergence, log_p: Tensor, logits: Tensor) -> Tensor:
    """∂D/∂z for a student given by logits."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(divergence(log_p, logits.log_softmax(-1)).sum(), logits)[0]


# Values and gradients


@pytest.mark.parametrize(
    ("divergence", "value", "grad"),
    [
        (ForwardKL(), 0.396058, (-0.400000, 0.200000, 0.200000)),
        (ReverseKL(), 0.365274, (-0.292777, 0.072776, 0.220001)),
        (JensenShannon(0.1), 0.034761, (-0.033654, 0.016280, 0.017374)),
        (JensenShannon(0.5), 0.091121, (-0.078773, 0.032140, 0.046632)),
        (JensenShannon(0.9), 0.032632, (-0.026435, 0.007709, 0.018726)),
        (TotalVariation(), 0.400000, (-0.160000, 0.100000, 0.060000)),
        (SkewKL(0.1), 0.305811, (-0.284464, 0.132589, 0.151875)),
        (SkewReverseKL(0.1), 0.292107, (-0.239435, 0.079099, 0.160336)),
        (AlphaBeta(0.5, 0.5), 0.372346, None),
        (AlphaBeta(0.2, 0.7), 0.414802, None),
        (AlphaBeta(1.0, 1.0), 0.120000, None),
        (AlphaBeta(2.0, -1.0), 0.506667, None),
        (AlphaBeta(0.0, 0.5), 0.689273, None),
        (JensenShannon(1e-6, normalized=True), 0.396058, None),
        (JensenShannon(0.1, normalized=True), 0.386236, None),
        (JensenShannon(0.5, normalized=True), 0.364483, None),
        (JensenShannon(0.9, normalized=True), 0.362583, None),
        (JensenShannon(1 - 1e-6, normalized=True), 0.365274, None),
        (ForwardKL(temperature=2.0), 0.106305, None),
        (ForwardKL(temperature=2.0, rescale=True), 0.425221, None),
    ],
    ids=name,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_symbols_by_hand(divergence, value, grad, dtype):
    log_p, log_q = P.log().to(dtype), Q.log().to(dtype)
    assert divergence(log_p, log_q).item() == pytest.approx(value, abs=7e-7)
    if grad is not None:
        assert gradient(divergence, log_p, log_q).tolist() == pytest.approx(grad, abs=7e-7)


@every
@pytest.mark.parametrize("size", SIZES)
def test_value_equals_an_independent_formula(divergence, size):
    log_p, log_q = random_pair(size)
    expected = FORMULAS[divergence](log_p.exp().numpy(), log_q.exp().numpy(), np.log)
    np.testing.assert_allclose(divergence(log_p, log_q).numpy(), expected, rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("size", SIZES)
def test_gradient_equals_autograd_of_an_independent_formula(divergence, size):
    log_p, log_q = random_pair(size)
    logits = log_q.clone().requires_grad_()
    formula = FORMULAS[divergence](log_p.exp(), logits.softmax(-1), torch.log).sum()
    expected = torch.autograd.grad(formula, logits)[0]
    torch.testing.assert_close(gradient(divergence, log_p, log_q), expected, rtol=1e-9, atol=1e-10)


@every
def test_gradient_equals_finite_differences(divergence):
    log_p, log_q = random_pair(3, rows=2)
    step, slopes = 1e-6, []
    for event in range(3):
        up, down = log_q.clone(), log_q.clone()
        up[:, event] += step
        down[:, event] -= step
        slopes.append((divergence(log_p, up.log_softmax(-1)) - divergence(log_p, down.log_softmax(-1))) / (2 * step))
    torch.testing.assert_close(gradient(divergence, log_p, log_q), torch.stack(slopes, -1), rtol=1e-6, atol=1e-8)


@every
def test_grad_log_q_is_q_times_the_derivative_of_value_by_q(divergence):
    log_p, log_q = random_pair(50)
    leaf = log_q.clone().requires_grad_()
    expected = torch.autograd.grad(divergence.value(log_p, leaf).sum(), leaf)[0]
    torch.testing.assert_close(divergence.grad_log_q(log_p, log_q), expected, rtol=1e-9, atol=1e-11)


@every
def test_value_and_gradient_at_once_are_value_and_gradient(divergence):
    for log_p, log_q in (random_pair(50), random_pair(50, spread=100.0)):
        value, grad = divergence.value_and_grad(log_p, log_q, log_p.exp(), log_q.exp())
        assert torch.equal(value, divergence.value(log_p, log_q))
        assert torch.equal(grad, divergence.grad_log_q(log_p, log_q))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("distance", [1e-3, 1e-2, 1e-1])
def test_float32_stays_accurate_where_the_student_is_nearly_the_teacher(beta, distance):
    """The value is second order in the distance, so that a first-order rounding error would be larger than it."""
    teacher, direction = (torch.randn(6, 140, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student = teacher + distance * direction
    exact = JensenShannon(beta)(teacher.double().log_softmax(-1), student.double().log_softmax(-1))
    rough = JensenShannon(beta)(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(rough.double(), exact, rtol=1e-6 / distance, atol=0)


@every
@pytest.mark.parametrize("size", [3, 1000])
def test_float32_stays_accurate(divergence, size):
    log_p, log_q = random_pair(size)
    rough = divergence(log_p.float(), log_q.float())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), divergence(log_p, log_q), rtol=5e-6, atol=1e-6)
    rough, exact = gradient(divergence, log_p.float(), log_q.float()).double(), gradient(divergence, log_p, log_q)
    torch.testing.assert_close(rough, exact, rtol=2e-5, atol=2e-6 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])
def test_float32_stays_accurate_for_extreme_mixtures(beta):
    log_p, log_q = random_pair(50, spread=3.0)
    divergence = JensenShannon(beta, normalized=True)
    rough = divergence(log_p.float(), log_q.float()).double()
    torch.testing.assert_close(rough, divergence(log_p, log_q), rtol=2e-5, atol=0)
    rough = gradient(divergence, log_p.float(), log_q.float()).double()
    torch.testing.assert_close(rough, gradient(divergence, log_p, log_q), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    log_p, log_q = (x.to(dtype) for x in random_pair(1000))
    expected = ForwardKL()(log_p.float(), log_q.float())
    leaf = log_q.clone().requires_grad_()
    value = ForwardKL()(log_p, leaf)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert grad.dtype == dtype
    assert ForwardKL()(log_p, log_q.double()).dtype == torch.float64


@every
def test_temperature_softens_both_sides_and_rescale_multiplies_by_its_square(divergence):
    log_p, log_q = random_pair(50)
    soft = type(divergence)(**{**vars(divergence), "temperature": 2.5})
    rescaled = type(divergence)(**{**vars(divergence), "temperature": 2.5, "rescale": True})
    expected = divergence((log_p / 2.5).log_softmax(-1), (log_q / 2.5).log_softmax(-1))
    torch.testing.assert_close(soft(log_p, log_q), expected)
    torch.testing.assert_close(rescaled(log_p, log_q), 6.25 * expected)
    torch.testing.assert_close(gradient(rescaled, log_p, log_q), 6.25 * gradient(soft, log_p, log_q))


def test_temperature_of_a_gradient_equals_autograd():
    log_p, log_q = random_pair(50)
    logits = log_q.clone().requires_grad_()
    formula = kl((log_p / 3).softmax(-1), (logits / 3).softmax(-1), torch.log).sum()
    expected = torch.autograd.grad(formula, logits)[0]
    torch.testing.assert_close(gradient(ForwardKL(temperature=3.0), log_p, log_q), expected)


def test_teacher_receives_no_gradient():
    log_p, log_q = random_pair(5)
    log_p.requires_grad_()
    value = ForwardKL()(log_p, log_q.requires_grad_()).sum()
    assert torch.autograd.grad(value, log_p, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JensenShannon(1.5), "beta between 0 and 1, not 1.5"),
        (lambda: SkewKL(-0.1), "skew_kl needs alpha"),
        (lambda: SkewReverseKL(2), "skew_reverse_kl needs alpha"),
        (lambda: ForwardKL(temperature=0), "temperature must be above 0, not 0"),
        (lambda: JensenShannon(temperature=-1), "temperature"),
        (lambda: SkewKL(float("nan")), "alpha"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Properties


@every
@pytest.mark.parametrize("size", SIZES)
def test_never_negative(divergence, size):
    log_p, log_q = random_pair(size, rows=50)
    assert (divergence(log_p, log_q) >= -1e-12).all()


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_with_zero_gradient_where_student_is_teacher(divergence, dtype):
    logits = random_pair(50)[0].to(dtype)
    log_p = logits.log_softmax(-1)
    assert divergence(log_p, log_p.clone()).abs().max() == 0
    assert gradient(divergence, log_p, logits).abs().max() < 4 * torch.finfo(dtype).eps


@every
def test_gradient_over_the_logits_sums_to_zero(divergence):
    log_p, log_q = random_pair(50)
    grad = gradient(divergence, log_p, log_q)
    assert (grad.sum(-1).abs() <= 1e-12 * grad.abs().sum(-1).clamp(min=1)).all()


@every
def test_permuting_the_vocabulary_permutes_the_gradient(divergence):
    log_p, log_q = random_pair(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(divergence(log_p[:, order], log_q[:, order]), divergence(log_p, log_q))
    permuted = gradient(divergence, log_p[:, order], log_q[:, order])
    torch.testing.assert_close(permuted, gradient(divergence, log_p, log_q)[:, order])


@every
def test_adding_a_constant_to_the_logits_changes_nothing(divergence):
    log_p, log_q = random_pair(50)
    torch.testing.assert_close(gradient(divergence, log_p, log_q + 7.0), gradient(divergence, log_p, log_q))
    torch.testing.assert_close(divergence(log_p, (log_q + 7.0).log_softmax(-1)), divergence(log_p, log_q))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_impossible_on_both_sides_takes_no_part(divergence, dtype):
    log_p, log_q = (x.to(dtype) for x in random_pair(5))
    impossible = torch.full((len(log_p), 1), -INF, dtype=dtype)
    log_p_more, log_q_more = torch.cat([log_p, impossible], -1), torch.cat([log_q, impossible], -1)
    torch.testing.assert_close(divergence(log_p_more, log_q_more), divergence(log_p, log_q))
    grad = gradient(divergence, log_p_more, log_q_more)
    assert torch.equal(grad[:, -1], torch.zeros_like(grad[:, -1]))
    torch.testing.assert_close(grad[:, :-1], gradient(divergence, log_p, log_q))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_not_nan_where_probabilities_vanish(divergence, dtype):
    tiny = (-INF, -800.0, -200.0, -95.0)
    log_p = torch.tensor([[a, -0.7, -0.7, b, c] for a in tiny for b in tiny for c in tiny], dtype=dtype)
    log_q = torch.tensor([[-0.9, a, -0.5, c, b] for a in tiny for b in tiny for c in tiny], dtype=dtype)
    for teacher, student in [(log_p, log_q), (log_q, log_p)]:
        value = divergence(teacher, student)
        assert not value.isnan().any()
        assert (value > -1e-6).all()
        assert divergence.grad_log_q(teacher, student).isfinite().all()
        assert gradient(divergence, teacher, student).isfinite().all()


def test_alpha_beta_gradient_does_not_overflow_where_the_student_gives_a_token_hardly_any_probability():
    log_p = torch.tensor([[math.log(0.5), math.log(0.5)]])
    log_q = torch.tensor([[0.0, -100.0]])
    torch.testing.assert_close(AlphaBeta(1.0, 0.0).grad_log_q(log_p, log_q)[:, 1], -log_p.exp()[:, 1])
    torch.testing.assert_close(AlphaBeta(1.0, 0.0)(log_p, log_q), ForwardKL()(log_p, log_q))


def test_kl_is_infinite_and_its_gradient_finite_where_supports_differ():
    log_p, log_q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.5, 0.5]]).log()
    assert ForwardKL()(log_p, log_q).item() == INF
    assert ReverseKL()(log_p, log_q).item() == INF
    assert JensenShannon(0.5)(log_p, log_q).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert AlphaBeta(2.0, -1.0)(log_p, log_q).item() == INF
    for divergence in ALL:
        assert gradient(divergence, log_p, log_q).isfinite().all()


@pytest.mark.parametrize("divergence", BOUNDED, ids=name)
def test_bounded_divergences_stay_finite_where_supports_differ(divergence):
    log_p, log_q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.5, 0.5]]).log()
    assert divergence(log_p, log_q).isfinite().all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", SIZES)
def test_jensen_shannon_is_dual_and_bounded_by_the_entropy_of_beta(beta, size):
    log_p, log_q = random_pair(size, rows=50)
    value = JensenShannon(beta)(log_p, log_q)
    torch.testing.assert_close(value, JensenShannon(1 - beta)(log_q, log_p), rtol=1e-10, atol=1e-12)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (value <= bound + 1e-12).all()
    disjoint_p, disjoint_q = (
        torch.tensor([0.3, 0.7, 0, 0]).log().double(),
        torch.tensor([0, 0, 0.2, 0.8]).log().double(),
    )
    assert JensenShannon(beta)(disjoint_p, disjoint_q).item() == pytest.approx(bound, abs=1e-7)


def test_jensen_shannon_of_equal_weights_is_symmetric():
    log_p, log_q = random_pair(50)
    torch.testing.assert_close(JensenShannon(0.5)(log_p, log_q), JensenShannon(0.5)(log_q, log_p), rtol=1e-12, atol=0)
    assert (JensenShannon(0.1)(log_p, log_q) - JensenShannon(0.1)(log_q, log_p)).abs().min() > 1e-6


def test_jensen_shannon_tends_to_forward_kl_over_beta():
    log_p, log_q, near = P.log(), Q.log(), 1e-6
    assert JensenShannon(near)(log_p, log_q).item() / near == pytest.approx(0.396058, abs=1e-6)
    slope = gradient(JensenShannon(near), log_p, log_q) / near
    torch.testing.assert_close(slope, Q - P, rtol=0, atol=1e-5)
    for beta, ratio in [(0.1, 0.347612), (0.01, 0.391016), (0.001, 0.395552)]:
        assert JensenShannon(beta)(log_p, log_q).item() / beta == pytest.approx(ratio, abs=1e-6)


def test_jensen_shannon_tends_to_reverse_kl_over_one_minus_beta():
    log_p, log_q, near = P.log(), Q.log(), 1e-6
    assert JensenShannon(1 - near)(log_p, log_q).item() / near == pytest.approx(0.365274, abs=1e-6)
    slope = gradient(JensenShannon(1 - near), log_p, log_q) / near
    torch.testing.assert_close(slope, gradient(ReverseKL(), log_p, log_q), rtol=0, atol=1e-5)
    for rest, ratio in [(0.01, 0.361286), (0.001, 0.364874)]:
        assert JensenShannon(1 - rest)(log_p, log_q).item() / rest == pytest.approx(ratio, abs=1e-6)


def test_jensen_shannon_jumps_at_its_ends_unless_it_is_normalized():
    log_p, log_q = random_pair(50)
    for end, near, limit in [(0, 1e-7, ForwardKL()), (1, 1 - 1e-7, ReverseKL())]:
        for normalized in (False, True):
            torch.testing.assert_close(JensenShannon(end, normalized)(log_p, log_q), limit(log_p, log_q))
            grad = gradient(JensenShannon(end, normalized), log_p, log_q)
            torch.testing.assert_close(grad, gradient(limit, log_p, log_q))
        smooth = JensenShannon(near, normalized=True)
        torch.testing.assert_close(smooth(log_p, log_q), limit(log_p, log_q), rtol=1e-4, atol=0)
        torch.testing.assert_close(gradient(smooth, log_p, log_q), gradient(limit, log_p, log_q), rtol=0, atol=5e-4)
        assert (JensenShannon(near)(log_p, log_q) < 1e-5).all()


@pytest.mark.parametrize(
    ("divergence", "curvature"),
    [
        (ForwardKL(), 1),
        (ReverseKL(), 1),
        (JensenShannon(0.1), 0.09),
        (JensenShannon(0.5), 0.25),
        (JensenShannon(0.1, normalized=True), 1),
        (JensenShannon(0.9, normalized=True), 1),
        (SkewKL(0.1), 0.81),
        (SkewReverseKL(0.1), 0.81),
    ],
    ids=name,
)
def test_near_the_teacher_every_divergence_is_half_a_scaled_chi_square(divergence, curvature):
    log_p, direction = random_pair(50)
    log_q = (log_p + 1e-4 * direction).log_softmax(-1)
    chi_square = ((log_p.exp() - log_q.exp()) ** 2 / log_p.exp()).sum(-1)
    torch.testing.assert_close(divergence(log_p, log_q), 0.5 * curvature * chi_square, rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_is_a_sum_of_two_skewed_divergences(beta):
    log_p, log_q = random_pair(50)
    parts = beta * SkewKL(beta)(log_p, log_q) + (1 - beta) * SkewReverseKL(1 - beta)(log_p, log_q)
    torch.testing.assert_close(JensenShannon(beta)(log_p, log_q), parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_total_variation_lies_below_its_bounds(size, spread):
    log_p, log_q = random_pair(size, rows=200, spread=spread)
    value = TotalVariation()(log_p, log_q)
    assert (value >= 0).all()
    assert (value <= 1 + 1e-12).all()
    assert (2 * value**2 <= ForwardKL()(log_p, log_q) + 1e-12).all()  # Pinsker
    assert (2 * value**2 <= ReverseKL()(log_p, log_q) + 1e-12).all()
    assert (JensenShannon(0.5)(log_p, log_q) <= math.log(2) * value + 1e-12).all()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.99])
def test_skewed_divergences_are_at_most_minus_log_alpha(alpha):
    log_p, log_q = random_pair(50, rows=100, spread=20.0)
    disjoint_p, disjoint_q = torch.tensor([1.0, 0.0]).log().double(), torch.tensor([0.0, 1.0]).log().double()
    for divergence in (SkewKL(alpha), SkewReverseKL(alpha)):
        assert (divergence(log_p, log_q) <= -math.log(alpha) + 1e-12).all()
        assert divergence(disjoint_p, disjoint_q).item() == pytest.approx(-math.log(alpha), abs=1e-12)


def test_skewed_divergences_tend_to_the_kls_and_to_zero():
    log_p, log_q = random_pair(50)
    for skewed, limit in [(SkewKL, ForwardKL()), (SkewReverseKL, ReverseKL())]:
        torch.testing.assert_close(skewed(1e-7)(log_p, log_q), limit(log_p, log_q), rtol=1e-4, atol=0)
        torch.testing.assert_close(skewed(0.0)(log_p, log_q), limit(log_p, log_q))
        torch.testing.assert_close(gradient(skewed(0.0), log_p, log_q), gradient(limit, log_p, log_q))
        assert skewed(1.0)(log_p, log_q).abs().max() == 0
        assert gradient(skewed(1.0), log_p, log_q).abs().max() < 1e-15


def test_soft_cross_entropy_differs_from_forward_kl_by_the_teachers_entropy_and_has_its_gradient():
    log_p, log_q = random_pair(50)
    logits = log_q.clone().requires_grad_()
    cross_entropy = -(log_p.exp() * logits.log_softmax(-1)).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(cross_entropy, ForwardKL()(log_p, log_q) + entropy)
    expected = torch.autograd.grad(cross_entropy.sum(), logits)[0]
    torch.testing.assert_close(gradient(ForwardKL(), log_p, log_q), expected)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 0.0, lambda p, q: (p * (p / q).log()).sum(-1)),
        (0.0, 1.0, lambda p, q: (q * (q / p).log()).sum(-1)),
        (0.5, 0.5, lambda p, q: 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)),
        (1.0, 1.0, lambda p, q: 0.5 * ((p - q) ** 2).sum(-1)),
        (2.0, -1.0, lambda p, q: 0.5 * ((p - q) ** 2 / q).sum(-1)),
    ],
)
def test_alpha_beta_contains_well_known_divergences(a, b, expected):
    log_p, log_q = random_pair(50)
    torch.testing.assert_close(AlphaBeta(a, b)(log_p, log_q), expected(log_p.exp(), log_q.exp()), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("a", "b"), [(0.0, 0.7), (0.0, -0.7), (0.7, 0.0), (-0.7, 0.0), (0.6, -0.6), (-0.6, 0.6), (0.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_beta_is_continuous_where_its_denominators_vanish(a, b, dtype):
    log_p, log_q = (x.to(dtype) for x in random_pair(10, spread=1.0))
    limit, grad = AlphaBeta(a, b)(log_p, log_q), gradient(AlphaBeta(a, b), log_p, log_q)
    # towards α = β = 0 a quotient of vanishing numbers is left, which needs float64 and a step that is not too small
    both = a == b == 0
    for step in (1e-5, -1e-5) if both else (1e-5, -1e-5, 1e-9, 1e-13):
        for near in (AlphaBeta(a + step, b), AlphaBeta(a, b + step), AlphaBeta(a + step, b + 2 * step)):
            if not (both and dtype == torch.float32):
                torch.testing.assert_close(near(log_p, log_q), limit, rtol=2e-4, atol=1e-5)
            rounding = 2e-5 * max(1.0, grad.abs().max().item())
            torch.testing.assert_close(gradient(near, log_p, log_q), grad, rtol=2e-4, atol=rounding)


@dataclass(frozen=True)
class ChiSquare(Divergence):
    """A divergence of a user: two functions."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() - log_p.exp()) ** 2 / log_q.exp()

    def grad_log_q(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() - (2 * log_p - log_q).exp()


def test_a_users_divergence_needs_two_functions():
    log_p, log_q = random_pair(5)
    torch.testing.assert_close(ChiSquare()(log_p, log_q), 2 * AlphaBeta(2.0, -1.0)(log_p, log_q))
    torch.testing.assert_close(gradient(ChiSquare(), log_p, log_q), 2 * gradient(AlphaBeta(2.0, -1.0), log_p, log_q))
