"""Events over two vocabularies: sums and gradients found again by autograd, ranks, and the values of ULD."""

from itertools import permutations

import pytest
import torch
from projected import DIVERGENCES, N, V, f64, generator, leaves, random_projected

from understudy.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from understudy.fused_linear.distributions import Dense
from understudy.fused_linear.events import OtherVocabulary, RankEvents, TokenEvents
from understudy.scores import Scores

OTHER = 19  # the teacher's vocabulary
MERGEABLE = [*(d for d in DIVERGENCES if d.temperature == 1.0), ReverseKL()]
TOKENS = torch.zeros(N, dtype=torch.long)
KNOWN = torch.arange(N) % 5 != 0


def token_events(empty=False):
    """Nine events; the last is of no token of the student with `empty`, and padding of the vocabulary belongs to it."""
    g = generator(7)
    teacher = torch.cat([torch.arange(8), torch.randint(0, 9, (OTHER - 8,), generator=g)])
    student = torch.cat([torch.arange(8), torch.randint(0, 8 if empty else 9, (V - 8 - (not empty),), generator=g)])
    return TokenEvents(teacher, student, 9)


def sums(log_probs, index, count):
    """Found again by a loop."""
    padded = [*index.tolist(), *[count - 1] * (log_probs.shape[-1] - len(index))]
    p = log_probs.exp()
    columns = [sum(p[:, v] for v, event in enumerate(padded) if event == e) for e in range(count)]
    eps = torch.finfo(p.dtype).eps
    return torch.stack([c if torch.is_tensor(c) else p.new_full((len(p),), eps) for c in columns], dim=-1).log()


@pytest.mark.parametrize("divergence", MERGEABLE, ids=repr)
@pytest.mark.parametrize("empty", [False, True])
def test_values_and_gradients_are_those_of_the_sums(divergence, empty):
    events, student, teacher = token_events(empty), random_projected(seed=1), random_projected(5, 2, vocabulary=OTHER)
    scores = Scores(TOKENS, OtherVocabulary(teacher.detach(), events, KNOWN))
    log_q = sums(student.log_probs(), events.student, events.count)
    log_p = sums(teacher.log_probs().detach(), events.teacher, events.count)
    expected = torch.where(KNOWN, divergence(log_p, log_q), 0)
    weights = torch.linspace(0.5, 2, N, dtype=f64)
    gradients = torch.autograd.grad((weights * expected).sum(), leaves(student))
    for q in (Scores(TOKENS, student, weights), Scores(TOKENS, Dense(student.log_probs()))):
        values = scores.divergence_to(q, divergence)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
        same = torch.autograd.grad((weights * values).sum(), leaves(student))
        torch.testing.assert_close(same, gradients, rtol=1e-6, atol=1e-8)


def test_impossible_tokens_and_events_give_finite_gradients():
    """A student that forbids all tokens of an event, and probabilities below the smallest number of the dtype."""
    events = TokenEvents(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1, 2]), 3)
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, 1.0], [300.0, 0.0, 0.0, 1.0]], requires_grad=True)
    merged = events.of_student(logits.log_softmax(-1))
    assert merged[0, 1] == -torch.inf
    assert merged[1, 1].item() == pytest.approx(-300 + torch.log(torch.tensor(2.0)).item())
    grad = events.token_gradient(torch.ones_like(merged), merged, logits.log_softmax(-1))
    torch.testing.assert_close(grad, torch.tensor([[1, 0, 0, 1], [1, 0.5, 0.5, 1]]))
    merged[:, [0, 2]].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("vocabulary", [OTHER, V, 40])
@pytest.mark.parametrize("divergence", [TotalVariation(), JensenShannon(0.3), ReverseKL()], ids=repr)
def test_ranks_have_the_gradients_of_sorted_probabilities(divergence, vocabulary):
    student, teacher = random_projected(seed=1), random_projected(5, 2, vocabulary=vocabulary)
    events = RankEvents(min(V, vocabulary))
    scores = Scores(TOKENS, OtherVocabulary(teacher.detach(), events, KNOWN))
    log_p, log_q = (x.log_probs().sort(descending=True).values for x in (teacher, student))

    def ranked(values):
        rest = values[:, events.shared :].exp().sum(-1, keepdim=True)
        return torch.cat([values[:, : events.shared], rest.clamp(min=torch.finfo(f64).eps).log()], dim=-1)

    expected = torch.where(KNOWN, divergence(ranked(log_p.detach()), ranked(log_q)), 0)
    gradients = torch.autograd.grad(expected.sum(), leaves(student))
    for q in (Scores(TOKENS, student, torch.ones(N, dtype=f64)), Scores(TOKENS, Dense(student.log_probs()))):
        values = scores.divergence_to(q, divergence)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(values.sum(), leaves(student)), gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("p", "q", "uld"),
    [
        ((0.5, 0.3, 0.2), (0.7, 0.3), 0.4),
        ((0.1, 0.6, 0.3), (0.3, 0.1, 0.6), 0.0),
        ((0.7, 0.3), (0.25,) * 4, 0.45 * 2 + 0.1),
    ],
)
def test_uld_is_twice_the_total_variation_over_ranks(p, q, uld):
    """Σ |p_(i) − q_(i)| with the shorter one padded with zeros; the first value is known for two vocabularies."""
    padded = [sorted([*x, *[0.0] * (4 - len(x))], reverse=True) for x in (p, q)]
    assert sum(abs(a - b) for a, b in zip(*padded, strict=True)) == pytest.approx(uld)
    log_p, log_q = (torch.tensor([x], dtype=f64).log() for x in (p, q))
    teacher = OtherVocabulary(Dense(log_p), RankEvents(min(len(p), len(q))), torch.tensor([True]))
    value = Scores(TOKENS[:1], teacher).divergence_to(Scores(TOKENS[:1], Dense(log_q)), TotalVariation())
    assert 2 * value.item() == pytest.approx(uld, abs=1e-12)


@pytest.mark.parametrize("divergence", [*MERGEABLE[:-2], ForwardKL()], ids=repr)
def test_ranks_give_the_smallest_divergence_over_all_correspondences_of_the_tokens(divergence):
    """Every f-divergence; the αβ-divergence, which is last among those for merged events, is none."""
    g = generator(3)
    for _ in range(5):
        log_p, log_q = (torch.randn(1, 5, generator=g, dtype=f64).mul(2).log_softmax(-1) for _ in range(2))
        events = RankEvents(5)
        value = divergence(events.of_teacher(log_p), events.of_student(log_q))[0]
        smallest = min(divergence(log_p[:, list(order)], log_q)[0] for order in permutations(range(5)))
        torch.testing.assert_close(value, smallest)


def test_what_events_cannot_tell_is_refused():
    teacher = OtherVocabulary(random_projected(5, 2, vocabulary=OTHER).detach(), token_events(), KNOWN)
    student = Scores(TOKENS, random_projected(seed=1))
    with pytest.raises(ValueError, match="cannot be softened"):
        Scores(TOKENS, teacher).divergence_to(student, ForwardKL(temperature=2.0))
    with pytest.raises(ValueError, match="compares distributions by a divergence"):
        _ = Scores(TOKENS, teacher).chosen
