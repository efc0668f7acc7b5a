"""DPKD: the loss of a pair to six digits, its limits, its expected gradient by enumeration, its responses in a run."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import VOCABULARY, BigramTeacher, ragged_examples, words
from loop import difference, logged, trainer, weights, whole_and_accumulated

from understudy.batch import Batch, Example
from understudy.divergences import ForwardKL, ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.method import MethodContext
from understudy.methods.dpkd import DPKD
from understudy.rollout import Rollout, Writer, Writers
from understudy.scores import Scores
from understudy.step import Step

F64 = torch.float64
PAIR = Batch.from_examples([Example([1], [3, 4, 5], "teacher", pair=0), Example([1], [6, 7], "student", pair=0)], 0)
LOG_P = torch.tensor([0.6, 0.5, 0.8, 0.1, 0.2], dtype=F64).log()
LOG_Q = torch.tensor([0.3, 0.4, 0.7, 0.4, 0.5], dtype=F64).log()
METRICS = ("teacher_reward", "student_reward", "margin", "preference_accuracy", "teacher_length", "student_length")


def pair_loss(method, log_q=LOG_Q, log_p=LOG_P, batch=PAIR):
    return method._pairwise(log_p, log_q, batch, [0], [1])[0]


@pytest.mark.parametrize(
    ("beta", "normalized", "loss", "winner", "loser"),
    [
        (0.1, False, 0.874751, -0.058303, 0.058303),
        (0.1, True, 0.771023, -0.017915, 0.026873),
        (1.0, False, 3.386809, -0.966184, 0.966184),
        (1.0, True, 1.702422, -0.272586, 0.408879),
    ],
)
def test_a_worked_pair_agrees_to_six_digits(beta, normalized, loss, winner, loser):
    log_q = LOG_Q.clone().requires_grad_()
    value = pair_loss(DPKD(beta=beta, length_normalized=normalized), log_q)
    value.backward()
    assert float(value) == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(log_q.grad, torch.tensor([winner] * 3 + [loser] * 2, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_student_equal_to_its_teacher_has_the_loss_log_two_on_every_pair(beta, normalized):
    assert float(pair_loss(DPKD(beta=beta, length_normalized=normalized), LOG_P)) == pytest.approx(math.log(2))


def test_a_pair_of_equal_responses_has_no_gradient():
    batch = Batch.from_examples([Example([1], [3, 4], "teacher", pair=0), Example([1], [3, 4], "student", pair=0)], 0)
    log_q = torch.tensor([0.3, 0.4], dtype=F64).log().requires_grad_()
    value = pair_loss(DPKD(), torch.cat([log_q, log_q]), torch.cat([LOG_P[:2], LOG_P[:2]]), batch)
    value.backward()
    assert float(value) == pytest.approx(math.log(2))
    assert float(log_q.grad.abs().max()) < 1e-15


def test_swapping_winner_and_loser_flips_the_margin():
    """L(−u) = L(u) + u, and L falls with u."""
    method = DPKD(beta=1.0, length_normalized=False)
    u = -3.352407
    swapped = method._pairwise(LOG_P, LOG_Q, PAIR, [1], [0])[0]
    assert float(swapped) == pytest.approx(float(pair_loss(method)) + u, abs=1e-6)
    assert float(pair_loss(method, LOG_Q + torch.tensor([0.1, 0, 0, 0, 0]))) < float(pair_loss(method))


def test_the_partition_function_cancels():
    """A constant added to both length-normalised log-ratios leaves the loss as it was."""
    assert float(pair_loss(DPKD(), LOG_Q + 0.37)) == pytest.approx(float(pair_loss(DPKD())), abs=1e-12)


def test_a_vanishing_beta_gives_log_two_and_a_gradient_that_vanishes_linearly():
    sizes = []
    for beta in (1e-3, 1e-4):
        log_q = LOG_Q.clone().requires_grad_()
        value = pair_loss(DPKD(beta=beta), log_q)
        value.backward()
        sizes.append(float(log_q.grad.norm()))
        assert float(value) == pytest.approx(math.log(2), abs=1e-3)
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize(
    ("beta", "loss", "gradient"),
    [(1.0, 1.287741, (-0.4, 0.2, 0.2)), (0.1, 0.733643, (-0.022540, 0.011240, 0.011300))],
)
def test_the_expected_gradient_by_enumeration(beta, loss, gradient):
    """One symbol, y_t ~ p and y_s ~ sg[q]: at β = 1 it is the forward KL's gradient, q − p."""
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    logits = q.log().requires_grad_()
    log_q = logits.log_softmax(-1)
    method = DPKD(beta=beta, length_normalized=False)
    expected = sum(
        p[t] * q[s] * method.preference_loss(p[t].log(), log_q[t], p[s].log(), log_q[s])
        for t in range(3)
        for s in range(3)
    )
    expected.backward()
    assert float(expected.detach()) == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=F64), rtol=0, atol=1e-6)
    if beta == 1:
        other = q.log().requires_grad_()
        ForwardKL()(p.log()[None], other.log_softmax(-1)[None]).sum().backward()
        torch.testing.assert_close(logits.grad, other.grad)


def token_level(rows_p, rows_q, **options):
    count = len(rows_q)
    batch = Batch.from_examples([Example([1], [0] * count, "teacher", pair=0)], 0)
    scores = [Scores(batch.tokens, Dense(torch.tensor(rows, dtype=F64).log())) for rows in (rows_p, rows_q)]
    return DPKD(level="token", **options).loss(*scores, batch)


def test_the_token_level_agrees_with_its_worked_values():
    p, q = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)
    assert float(token_level([p], [q], beta=0.1)) == pytest.approx(0.776853, abs=1e-6)
    assert float(token_level([p], [q], beta=1.0)) == pytest.approx(math.log(6), abs=1e-6)
    assert float(token_level([p, p], [q, p], beta=0.1)) == pytest.approx(0.735, abs=1e-6)


def test_agreeing_argmaxes_give_exactly_log_two_and_no_gradient():
    batch = Batch.from_examples([Example([1], [0], "teacher", pair=0)], 0)
    log_q = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).log().requires_grad_()
    scores = [Scores(batch.tokens, Dense(x)) for x in (torch.tensor([[0.8, 0.1, 0.1]], dtype=F64).log(), log_q)]
    value = DPKD(level="token").loss(*scores, batch)
    value.sum().backward()
    assert float(value) == math.log(2)
    assert float(log_q.grad.abs().max()) == 0


def test_the_token_level_never_falls_below_log_two():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(20, 9, generator=generator, dtype=F64) for _ in range(2)]
    q, p = ((x / x.sum(-1, keepdim=True)).tolist() for x in rows)
    assert all(float(token_level([b], [a])) >= math.log(2) - 1e-12 for a, b in zip(q, p, strict=True))


def test_other_preferences_follow_their_formulas():
    q_t, p_t, q_s, p_s = (torch.tensor(x, dtype=F64) for x in (-1.0, -0.7, -2.0, -1.1))
    h = (q_t - p_t) - (q_s - p_s)
    sigma = torch.sigmoid
    expected = {
        "dpo": -sigma(0.2 * h).log(),
        "ipo": (h - 2.5) ** 2,
        "cpo": -sigma(0.2 * (q_t - q_s)).log() - q_t,
        "simpo": -sigma(0.2 * (q_t - q_s) - 0.3).log(),
        "dpop": -sigma(0.2 * (h - 50 * 0.3)).log(),
    }
    for name, value in expected.items():
        method = DPKD(beta=0.2, preference=name, margin=0.3, length_normalized=False)
        loss = method._pairwise(torch.stack([p_t, p_s]), torch.stack([q_t, q_s]), SINGLE, [0], [1])[0]
        assert float(loss) == pytest.approx(float(value), abs=1e-12), name
    smooth = DPKD(beta=0.2, label_smoothing=0.1).preference_loss(p_t, q_t, p_s, q_s)
    assert float(smooth) == pytest.approx(float(-0.9 * sigma(0.2 * h).log() - 0.1 * sigma(-0.2 * h).log()))
    free = DPKD(beta=0.2, reference_free=True)._pairwise(LOG_P[:2], torch.stack([q_t, q_s]), SINGLE, [0], [1])[0]
    assert float(free) == pytest.approx(float(-sigma(0.2 * (q_t - q_s)).log()))


SINGLE = Batch.from_examples([Example([1], [3], "teacher", pair=0), Example([1], [6], "student", pair=0)], 0)


def collected(method, step=0, rows=3):
    examples = [replace(e, response=[], row=i) for i, e in enumerate(ragged_examples(rows))]
    writers = Writers(Writer(Dated("student")), Writer(Dated("teacher")))
    return method.collect(examples, writers, Step(step))


class Dated(Rollout):
    """A rollout whose responses are [author, step]."""

    def __init__(self, author):
        self.name = author

    def bind(self, model, tokenizer, author="student"):
        return self

    def generate(self, prompts, sampling, step):
        return [replace(e, response=[len(self.name), step.number + 3], author=self.name) for e in prompts]


def test_teacher_and_student_respond_to_the_same_prompt_in_pairs():
    examples = collected(DPKD())
    expected = [(author, row, row) for row in range(3) for author in ("teacher", "student")]
    assert [(e.author, e.pair, e.row) for e in examples] == expected


@pytest.mark.parametrize(("refresh", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (0, [0, 0, 0, 0])])
def test_student_responses_are_refreshed_when_older_than_refresh_steps(refresh, expected):
    method = DPKD(refresh=refresh)
    steps = [collected(method, number)[1].response[1] - 3 for number in range(4)]
    assert steps == expected
    restored = DPKD(refresh=refresh)
    restored.load_state_dict(method.state_dict())
    assert restored._responses == method._responses


def test_as_many_texts_of_a_corpus_as_prompts_join_a_step():
    method = DPKD()
    corpus = [Example([1], [9, 9, 2], "corpus", row=i) for i in range(50)]
    method.setup(MethodContext(None, words(), VOCABULARY, 1e-3, corpus))
    texts = [e for e in collected(method) if e.author == "corpus"]
    assert len(texts) == 3
    assert [e.row for e in texts] == [e.row for e in collected(method) if e.author == "corpus"]
    assert [e.row for e in texts] != [e.row for e in collected(method, 1) if e.author == "corpus"]


def test_the_corpus_adds_its_weighted_negative_log_likelihood():
    batch = Batch.from_examples([*PAIR.examples, Example([1], [8, 9], "corpus")], 0)
    texts = torch.tensor([0.5, 0.25], dtype=F64).log()
    log_q, log_p = torch.cat([LOG_Q, texts]), torch.cat([LOG_P, texts])
    scores = [Scores(batch.tokens, Dense(_only(x, batch))) for x in (log_p, log_q)]
    pair, text = DPKD(lm_weight=0.5).loss(*scores, batch)
    assert float(pair) == pytest.approx(0.771023, abs=1e-6)
    assert float(text) == pytest.approx(-0.5 * float(texts.mean()))
    assert batch.normalizer(DPKD.reduction) == 1
    mixed = DPKD(sft_weight=0.25).loss(*scores, batch)[0]
    assert float(mixed) == pytest.approx(0.75 * 0.771023 - 0.25 * float(LOG_Q[:3].mean()), abs=1e-6)


def _only(chosen, batch, vocabulary=10):
    """(N, V) log-probabilities of which only the chosen tokens' matter."""
    rows = torch.full((len(chosen), vocabulary), -9.0, dtype=F64)
    return rows.scatter(1, batch.tokens[:, None], chosen[:, None])


@pytest.mark.parametrize(
    "options", [{}, {"level": "token"}, {"refresh": 2}, {"preference": "simpo", "sft_weight": 0.5}]
)
def test_a_run_does_not_depend_on_how_it_is_accumulated(options, tmp_path):
    one, other = whole_and_accumulated(tmp_path, DPKD, **options)
    assert difference(weights(one.model), weights(other.model)) < 1e-6


def test_an_interrupted_run_resumes_to_the_bit(tmp_path):
    uninterrupted = trainer(tmp_path, DPKD(refresh=2), max_steps=6, save_strategy="steps", save_steps=3)
    uninterrupted.train()
    resumed = trainer(tmp_path, DPKD(refresh=2), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def pair_scores(log_p=LOG_P, log_q=LOG_Q, batch=PAIR):
    """Scores of teacher and student on a pair; only the chosen tokens' log-probabilities matter."""
    return [Scores(batch.tokens, Dense(_only(x, batch))) for x in (log_p, log_q)]


def test_implicit_rewards_margin_accuracy_and_lengths_are_metrics():
    """β/|y| log q(y)/p(y) of the worked pair: −1.049822/3 and 2.302585/2 times β."""
    metrics = DPKD(beta=0.1).metrics(*pair_scores(), PAIR)
    assert tuple(metrics) == METRICS
    expected = {
        "teacher_reward": -0.1 * 1.049822 / 3,
        "student_reward": 0.1 * 2.302585 / 2,
        "margin": -0.150123,
        "preference_accuracy": 0.0,
        "teacher_length": 3,
        "student_length": 2,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert DPKD(level="token").metrics(*pair_scores(), PAIR) == {}
    swapped = DPKD().metrics(*pair_scores(LOG_Q, LOG_P), PAIR)
    assert float(swapped["preference_accuracy"]) == 1


def test_a_run_logs_the_method_s_metrics_and_the_divergences(tmp_path):
    run = trainer(tmp_path, DPKD())
    run.train()
    for name in (*METRICS, "reverse_kl", "forward_kl"):
        assert len(logged(run, name)) == 4, name
    margins = zip(*(logged(run, name) for name in ("teacher_reward", "student_reward", "margin")), strict=True)
    assert all(t - s == pytest.approx(m, abs=1e-6) for t, s, m in margins)


def test_stage_one_s_terms_cancel_with_the_student_s_own_implicit_reward():
    """E_q[β log(q/p)] − β KL(q‖p) = 0 for every q: by itself stage one defines the reward and trains nothing."""
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    beta, logits = 0.5, q.log().requires_grad_()
    log_q = logits.log_softmax(-1)
    implicit = beta * (log_q.detach() - p.log())
    value = (log_q.exp() * implicit).sum() - beta * ReverseKL()(p.log()[None], log_q[None]).sum()
    [gradient] = torch.autograd.grad(value, logits)
    assert float(value) == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-12


def test_stage_one_with_a_given_reward_has_the_closed_form_of_gkd_with_one():
    """argmax E_q[r] − β KL(q‖p) ∝ p exp(r/β): β = 1/2, r = (1, 0, 0); r is recovered as β log(q*/p) + β log Z."""
    p, r, beta = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([1.0, 0.0, 0.0], dtype=F64), 0.5
    best = (p.log() + r / beta).softmax(-1)
    torch.testing.assert_close(best, torch.tensor([0.917243, 0.062068, 0.020689], dtype=F64), rtol=0, atol=1e-6)
    z = float((p * (r / beta).exp()).sum())
    torch.testing.assert_close(beta * (best / p).log() + beta * math.log(z), r, rtol=0, atol=1e-6)


def test_the_reverse_kl_of_stage_one_counts_on_the_student_s_response():
    generator = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(5, 9, generator=generator, dtype=F64).log_softmax(-1) for _ in range(2))
    scores = [Scores(PAIR.tokens, Dense(x)) for x in (log_p, log_q)]
    [plain], [more] = DPKD().loss(*scores, PAIR), DPKD(reverse_kl_weight=0.3).loss(*scores, PAIR)
    own = ReverseKL()(log_p[3:], log_q[3:]).mean()
    assert float(more - plain) == pytest.approx(0.3 * float(own), abs=1e-12)
    assert DPKD(reverse_kl_weight=0.3).requires > DPKD().requires


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="level: token has none"):
        DPKD(level="token", reverse_kl_weight=0.1)
    with pytest.raises(ValueError, match="beta above 0"):
        DPKD(beta=0)
    with pytest.raises(ValueError, match="sft_weight"):
        DPKD(sft_weight=1)
    with pytest.raises(ValueError, match="teacher's responses"):
        trainer(tmp_path, DPKD(), with_teacher=BigramTeacher()).train()
