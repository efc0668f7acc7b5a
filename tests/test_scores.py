"""Scores: divergences between two models, metrics of them, and policy gradients against enumerated closed forms."""

import itertools
from dataclasses import replace

import pytest
import torch
from fakes import VOCABULARY, Tabular, tiny
from gradients import BATCH
from torch import Tensor

from understudy import scores
from understudy.batch import Batch, Example
from understudy.divergences import ForwardKL, ReverseKL
from understudy.fused_linear.distributions import Dense, Projected
from understudy.fused_linear.merged import TopK
from understudy.models.forward import score, score_no_grad
from understudy.scores import Scores, divergence_metrics

f64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(scores, "rows_per_tile", lambda vocabulary, device: 4)


# Divergences and chosen tokens


def test_divergence_to_is_from_the_teacher_to_the_student():
    p, q = torch.tensor([P1], dtype=f64), torch.tensor([Q1], dtype=f64)
    teacher, student = (Scores(torch.zeros(1, dtype=torch.long), Dense(x.log())) for x in (p, q))
    assert teacher.divergence_to(student, ForwardKL()).item() == pytest.approx(0.396058, abs=1e-6)
    assert teacher.divergence_to(student, ReverseKL()).item() == pytest.approx(0.365274, abs=1e-6)


def test_chosen_of_a_top_k_teacher_are_the_values_that_it_reports():
    log_p = score_no_grad(tiny("llama", seed=1), BATCH).log_probs
    reported = log_p.gather(-1, BATCH.tokens[:, None])[:, 0]
    assert torch.equal(Scores(BATCH.tokens, TopK(*log_p.topk(3), reported)).chosen, reported)


def test_chosen_of_a_top_k_teacher_that_does_not_report_them_is_refused():
    """Although some chosen tokens are among the top K: whether they are depends on the row."""
    log_p = score_no_grad(tiny("llama", seed=1), BATCH).log_probs
    with pytest.raises(
        ValueError, match="reports its top tokens only, and not the log-probability of the chosen token"
    ):
        _ = Scores(BATCH.tokens, TopK(*log_p.topk(3))).chosen


def test_cut_takes_tokens_out_of_every_distribution_and_keeps_tokens_and_weights():
    scores = replace(score_no_grad(tiny("llama", seed=1), BATCH), weights=BATCH.weights("token"))
    top_k = TopK(*scores.log_probs.topk(3), scores.chosen)
    expected = scores.log_probs[:, :40].log_softmax(-1)
    for distribution in (scores.distribution, Dense(scores.log_probs)):
        cut = replace(scores, distribution=distribution).cut(40)
        torch.testing.assert_close(cut.log_probs, expected)
        assert cut.tokens is scores.tokens
        assert cut.weights is scores.weights
    assert replace(scores, distribution=top_k).cut(40).distribution is top_k


def test_a_factor_on_row_weights_multiplies_those_that_are_given_and_leaves_late_ones_open():
    scores, factor = score_no_grad(tiny("llama"), BATCH), torch.arange(len(BATCH.tokens))
    assert scores.reweighted(factor).weights is None
    weights = BATCH.weights("sequence")
    assert torch.equal(replace(scores, weights=weights).reweighted(factor).weights, weights * factor)


# Metrics


@pytest.mark.parametrize("top_k", [False, True])
def test_metrics_are_both_kls_and_both_entropies(top_k):
    student, teacher = (score_no_grad(tiny("llama", seed=seed).to(f64), BATCH) for seed in (0, 1))
    p, q = teacher.log_probs.exp(), student.log_probs.exp()
    if top_k:
        values, support = teacher.log_probs.topk(6)
        teacher = Scores(BATCH.tokens, TopK(values, support))
        p, q = (torch.cat([x.gather(-1, support), 1 - x.gather(-1, support).sum(-1, keepdim=True)], -1) for x in (p, q))
    metrics = divergence_metrics(teacher, student)
    torch.testing.assert_close(metrics["forward_kl"], (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(metrics["reverse_kl"], (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(metrics["student_entropy"], -(q * q.log()).sum(-1))
    torch.testing.assert_close(metrics["teacher_entropy"], -(p * p.log()).sum(-1))


def test_metrics_of_vocabularies_of_different_size_are_over_the_shared_tokens():
    student, teacher = score_no_grad(tiny("llama"), BATCH), score_no_grad(tiny("llama", vocabulary=60, seed=1), BATCH)
    metrics = divergence_metrics(teacher, student)
    expected = ForwardKL()(teacher.distribution.log_probs()[:, :VOCABULARY].log_softmax(-1), student.log_probs)
    torch.testing.assert_close(metrics["forward_kl"], expected)
    assert isinstance(teacher.distribution, Projected)


# All responses enumerated: two steps of three tokens, after one prompt token

PROMPT = 0
P1, Q1 = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]
P2 = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]
Q2 = [[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.5, 0.25]]


def tabular(first: list[float], second: list[list[float]]) -> Tabular:
    table = {(PROMPT,): torch.tensor(first, dtype=f64).log()}
    for token in range(3):
        table[PROMPT, token] = torch.tensor(second[token], dtype=f64).log()
    return Tabular(table)


RESPONSES = [Example([PROMPT], [a, b], author="student") for a, b in itertools.product(range(3), repeat=2)]
ALL_RESPONSES = Batch.from_examples(RESPONSES, pad=0)
PROBABILITY_Q = torch.tensor([Q1[a] * Q2[a][b] for a, b in itertools.product(range(3), repeat=2)], dtype=f64)
PROBABILITY_P = torch.tensor([P1[a] * P2[a][b] for a, b in itertools.product(range(3), repeat=2)], dtype=f64)


def expected_loss(divergence, reduction: str, student: Tabular, teacher: Tabular) -> Tensor:
    """E over the student's responses of a response's loss; responses are data, the divergence is differentiated."""
    p = score_no_grad(teacher, ALL_RESPONSES, fused=False)

    def per_response(q: Scores) -> Tensor:
        return ALL_RESPONSES.per_sequence(ALL_RESPONSES.weights(reduction) * p.divergence_to(q, divergence))

    return (PROBABILITY_Q * score(student, ALL_RESPONSES, per_response, fused=False)).sum()


@pytest.mark.parametrize(("divergence", "mean"), [(ForwardKL(), 0.334096), (ReverseKL(), 0.312208)])
def test_on_policy_loss_enumerated_over_all_responses(divergence, mean):
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    assert expected_loss(divergence, "sequence", student, teacher).item() == pytest.approx(mean, abs=1e-6)
    assert expected_loss(divergence, "sum", student, teacher).item() == pytest.approx(2 * mean, abs=2e-6)


def test_summed_on_policy_reverse_kl_is_the_divergence_between_sequences():
    expected = (PROBABILITY_Q * (PROBABILITY_Q / PROBABILITY_P).log()).sum()
    summed = expected_loss(ReverseKL(), "sum", tabular(Q1, Q2), tabular(P1, P2))
    assert expected.item() == pytest.approx(0.624417, abs=1e-6)
    torch.testing.assert_close(summed, expected)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("sequence", 0.5)])
def test_sampling_is_not_differentiated_so_the_first_step_has_the_gradient_of_its_own_divergence(reduction, share):
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    expected_loss(ReverseKL(), reduction, student, teacher).backward()
    first = student.logits.grad[student.rows[PROMPT,]] / share
    assert first.tolist() == pytest.approx([-0.292777, 0.072776, 0.220001], abs=1e-6)
    # the gradient of the sequences' divergence also counts how the first token changes what comes after
    logits = torch.tensor(Q1, dtype=f64).log().requires_grad_()
    probability = logits.softmax(-1)[:, None] * torch.tensor(Q2, dtype=f64)
    exact = torch.autograd.grad((probability.flatten() * (probability.flatten() / PROBABILITY_P).log()).sum(), logits)[
        0
    ]
    assert exact.tolist() == pytest.approx([-0.319804, 0.110602, 0.209202], abs=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_policy_gradient_of_the_log_ratio_is_in_expectation_the_reverse_kl_gradient(centred):
    """With the advantage log p(v) − log q(v) of sampled tokens alone; a constant in it changes nothing."""
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    p = score_no_grad(teacher, ALL_RESPONSES, fused=False)

    def surrogate(q: Scores) -> Tensor:
        advantage = (p.chosen - q.chosen).detach() - (0 if centred else 1)
        return ALL_RESPONSES.per_sequence(-advantage * q.chosen)

    (PROBABILITY_Q * score(student, ALL_RESPONSES, surrogate, fused=False)).sum().backward()
    estimated = student.logits.grad.clone()
    student.logits.grad = None
    expected_loss(ReverseKL(), "sum", student, teacher).backward()
    torch.testing.assert_close(estimated, student.logits.grad, rtol=1e-10, atol=1e-12)
    assert estimated[student.rows[PROMPT,]].tolist() == pytest.approx([-0.292777, 0.072776, 0.220001], abs=1e-6)


def test_policy_gradient_with_reward_to_go_is_in_expectation_the_gradient_of_the_sequences_divergence():
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    p = score_no_grad(teacher, ALL_RESPONSES, fused=False)

    def surrogate(q: Scores) -> Tensor:
        reward = (p.chosen - q.chosen).detach().view(-1, 2)
        to_go = reward.flip(-1).cumsum(-1).flip(-1).flatten()
        return ALL_RESPONSES.per_sequence(-(to_go - 1) * q.chosen)

    (PROBABILITY_Q * score(student, ALL_RESPONSES, surrogate, fused=False)).sum().backward()
    first = student.logits.grad[student.rows[PROMPT,]]
    assert first.tolist() == pytest.approx([-0.319804, 0.110602, 0.209202], abs=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_chosen_log_probabilities_read_without_gradients_first_have_gradients_after(fused):
    """A policy gradient: the advantage is read under no_grad, the loss with gradients."""
    teacher, gradients = score_no_grad(tiny("llama", seed=1), BATCH), []
    for first in (True, False):
        model = tiny("llama")

        def loss(student, first=first):
            if first:
                with torch.no_grad():
                    advantage = teacher.chosen - student.chosen
            else:
                advantage = (teacher.chosen - student.chosen).detach()
            return -(advantage * student.chosen).sum()

        score(model, BATCH, loss, fused=fused).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
