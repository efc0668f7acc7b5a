"""Dense distributions, and the top K of one as K+1 events."""

import pytest
import torch
from projected import DIVERGENCES, N, V, f64, generator, leaves, random_projected, top_k
from torch import Tensor

from understudy.divergences import AlphaBeta, ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.fused_linear.loss import divergence_loss, row_values
from understudy.fused_linear.merged import TopK

TOP_K_DIVERGENCES = [d for d in DIVERGENCES if d.temperature == 1.0] + [ReverseKL()]


def test_dense_log_probabilities_are_normalised_over_the_shared_tokens():
    values = torch.randn(N, V, generator=generator(), dtype=f64).log_softmax(-1)
    cut = Dense(values).cut(10)
    torch.testing.assert_close(cut.values, values[:, :10].log_softmax(-1))
    assert Dense(values).cut(V).values is values


def merged(log_p: Tensor, support: Tensor) -> Tensor:
    """K+1 events, written with probabilities."""
    p = log_p.exp()
    in_support = p.gather(-1, support)
    outside = torch.ones_like(p).scatter(-1, support, 0)
    return torch.cat([in_support, (p * outside).sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("divergence", TOP_K_DIVERGENCES, ids=repr)
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_top_k_teacher_is_a_full_teacher_over_merged_events(divergence, k, tile_rows):
    student = random_projected(seed=1)
    log_p = random_projected(seed=2).log_probs().detach()
    teacher = top_k(log_p, k)
    expected = divergence(merged(log_p, teacher.support), merged(student.log_probs(), teacher.support))
    values = row_values(student, divergence_loss(divergence, teacher), torch.ones(N))
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    weights = torch.rand(N, generator=generator(9), dtype=f64) - 0.3
    grads = torch.autograd.grad((values * weights).sum(), leaves(student))
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves(student))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("divergence", [d for d in TOP_K_DIVERGENCES if not isinstance(d, AlphaBeta)], ids=repr)
def test_a_larger_k_never_lowers_a_divergence_and_ends_at_the_full_one(divergence):
    """The teacher has no token of hardly any probability: as "any other token" it would be 1 less all the rest, whose
    rounding is larger than what is compared here.
    """
    student = random_projected(seed=1)
    log_p = random_projected(seed=2, scale=0.3).log_probs().detach()
    assert log_p.exp().min() > 1e-4
    full = divergence(log_p, student.log_probs())
    before = torch.zeros_like(full)
    for k in range(1, V + 1):
        value = row_values(student, divergence_loss(divergence, top_k(log_p, k)))
        assert (value >= before - 1e-12).all()
        assert (value <= full + 1e-12).all()
        before = value
    torch.testing.assert_close(before, full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("divergence", TOP_K_DIVERGENCES, ids=repr)
def test_a_support_of_the_whole_vocabulary_is_the_full_teacher(divergence, dtype):
    student = random_projected(seed=1, dtype=dtype)
    log_p = random_projected(seed=2, dtype=dtype).log_probs().detach()
    teacher = top_k(log_p, V)
    plain = divergence(teacher.log_probs(), teacher.merge(student.log_probs()))
    expected = divergence(log_p, student.log_probs())
    expected_grads = torch.autograd.grad(expected.sum(), leaves(student))
    for values in (row_values(student, divergence_loss(divergence, teacher), torch.ones(N)), plain):
        # the αβ family's powers below 1 lift the remaining event's rounding
        rounding = 2e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=rounding)
        grads = torch.autograd.grad(values.sum(), leaves(student))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=10 * rounding)


def test_rounding_of_a_confident_top_k_teacher_does_not_raise_the_divergence():
    log_p = torch.tensor([[-1e-9, -21.0, -22.0]])  # in float32 nothing is left for any other token
    log_q = torch.tensor([[0.9, 0.05, 0.05]]).log()
    teacher = TopK(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))
    value = ReverseKL()(teacher.log_probs(), teacher.merge(log_q))
    assert value < ReverseKL()(log_p, log_q) + 0.1


def test_top_k_teachers_cannot_be_softened():
    with pytest.raises(ValueError, match="cannot be softened"):
        top_k(torch.zeros(1, 4).log_softmax(-1), 2).log_probs(temperature=2.0)


def test_rows_and_cut_of_a_top_k_keep_the_chosen_log_probabilities():
    log_p = random_projected(seed=2).log_probs().detach()
    teacher = TopK(*log_p.topk(5), log_p[:, 3])
    rows = teacher.rows(slice(4, 9))
    assert torch.equal(rows.values, teacher.values[4:9])
    assert torch.equal(rows.support, teacher.support[4:9])
    assert torch.equal(rows.chosen(torch.full((5,), 3)), log_p[4:9, 3])
    assert teacher.cut(2).chosen_values is teacher.chosen_values
    assert TopK(*log_p.topk(5)).rows(slice(4, 9)).chosen_values is None


def test_chosen_of_a_top_k_without_them_is_refused():
    log_p = random_projected(seed=2).log_probs().detach()
    teacher = TopK(*log_p.topk(5))
    with pytest.raises(ValueError, match="not the log-probability of the chosen token"):
        teacher.chosen(teacher.support[:, 0])


def test_the_top_k_of_no_tokens_is_one_event():
    log_p = random_projected(seed=2).log_probs().detach()
    teacher = TopK(*log_p.topk(0), log_p[:, 3])
    assert teacher.log_probs().tolist() == [[0.0]] * N
    torch.testing.assert_close(teacher.merge(log_p), torch.zeros(N, 1, dtype=f64), rtol=0, atol=1e-12)
    assert torch.equal(teacher.chosen(torch.full((N,), 3)), log_p[:, 3])
