"""OPD: its expected gradient by enumeration, clipping, the student's top K, rewards, and training runs."""

from dataclasses import replace

import pytest
import torch
from fakes import ChosenTeacher, TopKOnlyTeacher
from loop import difference, logged, short_sampling, trainer, weights, whole_and_accumulated

from understudy.batch import Batch, Example
from understudy.divergences import ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.methods.opd import OPD
from understudy.reward import Reward
from understudy.scores import Scores

F64 = torch.float64
CLOSE = {"rtol": 0, "atol": 1e-6}  # streams are float32
P = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
Q = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
P_NEXT = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=F64)  # after each first token
Q_NEXT = torch.tensor([[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.5, 0.25]], dtype=F64)
SEQUENCES = [(first, second) for first in range(3) for second in range(3)]


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


def rows_of(first, after):
    """(18, 3) the distributions at both tokens of the nine responses."""
    return torch.stack([row for y in SEQUENCES for row in (first, after[y[0]])])


def expected(method, first=None, after=None, q_old=None, **streams):
    """E over all responses of two tokens, drawn from q_old, of the sum of the method's loss; and each one's values."""
    first = Q.log() if first is None else first
    after = Q_NEXT.log() if after is None else after
    old = rows_of(Q, Q_NEXT).log() if q_old is None else q_old
    sampled = old.gather(-1, torch.tensor(SEQUENCES).view(-1, 1))[:, 0].view(9, 2)
    examples = [
        Example(
            [1], list(y), "student", streams={"sampled_logprob": row, **{k: [v[i]] * 2 for k, v in streams.items()}}
        )
        for i, (y, row) in enumerate(zip(SEQUENCES, sampled.tolist(), strict=True))
    ]
    batch = Batch.from_examples(examples, 0)
    log_q = rows_of(first.log_softmax(-1), after.log_softmax(-1))
    teacher, student = (Scores(batch.tokens, Dense(x)) for x in (rows_of(P, P_NEXT).log(), log_q))
    values = method.loss(teacher, student, batch)
    return (sampled.sum(-1).exp() * batch.per_sequence(values)).sum(), values, method.metrics(teacher, student, batch)


def gradients(method, **options):
    leaves = Q.log().requires_grad_(), Q_NEXT.log().requires_grad_()
    return torch.autograd.grad(expected(method, *leaves, **options)[0], leaves)


def reverse_kls(first, after):
    """KL(q‖p) of the first token, and of the second one after each first token."""
    return (ReverseKL()(p.log(), x.log_softmax(-1)) for p, x in ((P, first), (P_NEXT, after)))


def test_without_a_discount_the_expected_gradient_is_the_reverse_kl_s_of_every_token():
    first, after = Q.log().requires_grad_(), Q_NEXT.log().requires_grad_()
    now, later = reverse_kls(first, after)
    by_token = torch.autograd.grad(now + Q @ later, (first, after))
    for gradient, closed_form in zip(gradients(OPD()), by_token, strict=True):
        torch.testing.assert_close(gradient, closed_form, **CLOSE)
    torch.testing.assert_close(by_token[0], torch.tensor([-0.292777, 0.072776, 0.220001], dtype=F64), **CLOSE)
    half = gradients(OPD(kl_weight=0.5))
    torch.testing.assert_close(half[0], by_token[0] / 2, **CLOSE)


def test_with_a_discount_of_one_it_is_the_gradient_of_the_kl_between_sequences():
    first, after = Q.log().requires_grad_(), Q_NEXT.log().requires_grad_()
    now, later = reverse_kls(first, after)
    sequence = now + first.softmax(-1) @ later
    assert float(sequence.detach()) == pytest.approx(0.624417, abs=1e-6)
    for gradient, closed_form in zip(
        gradients(OPD(discount=1.0)), torch.autograd.grad(sequence, (first, after)), strict=True
    ):
        torch.testing.assert_close(gradient, closed_form, **CLOSE)


def test_the_loss_is_the_sampled_reverse_kl():
    value, values, metrics = expected(OPD(kl_weight=2.0))
    torch.testing.assert_close(values, 2 * metrics["sampled_reverse_kl"].double(), **CLOSE)
    assert float(value) == pytest.approx(2 * 0.624417, abs=1e-5)


def test_clipping_does_nothing_at_the_weights_that_drew_the_responses():
    for one, other in zip(gradients(OPD(clip=1e-3)), gradients(OPD(clip=None)), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_at_other_weights_the_loss_is_that_of_ppo():
    """A token whose probability has changed beyond the range in the direction of its advantage has no gradient."""
    first = (2.5 * Q.log()).requires_grad_()
    _, values, metrics = expected(OPD(), first)
    ratio, advantage = (first.log_softmax(-1).exp() / Q).detach(), (P / Q).log()
    by_hand = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    torch.testing.assert_close(values.detach()[::6], by_hand, **CLOSE)  # the first tokens of responses 0, 3 and 6
    assert metrics["beyond_clip"][::2].tolist() == [1.0] * 9
    assert metrics["beyond_clip"][1::2].tolist() == [0.0] * 9
    (gradient,) = torch.autograd.grad(values[::6].sum(), first)
    log_q = first.log_softmax(-1)
    not_clipped = -(ratio * advantage)[:2] @ log_q[:2]  # token 2 is rarer than 0.8 times before, as it should be
    torch.testing.assert_close(gradient, torch.autograd.grad(not_clipped, first)[0], **CLOSE)


def test_a_rewards_advantage_is_added():
    advantage = torch.linspace(-1, 1, 9, dtype=F64).tolist()
    with_reward = gradients(OPD(reward=Reward([short])), advantage=advantage, reward=advantage)
    first, after = Q.log().requires_grad_(), Q_NEXT.log().requires_grad_()
    q = (first.softmax(-1)[:, None] * after.softmax(-1)).flatten()
    policy = torch.autograd.grad(-(q * torch.tensor(advantage, dtype=F64)).sum(), (first, after))
    for both, divergence, reward in zip(with_reward, gradients(OPD()), policy, strict=True):
        torch.testing.assert_close(both, divergence + reward, **CLOSE)
    dense = gradients(OPD(student_top_k=3, reward=Reward([short])), advantage=advantage, reward=advantage)
    torch.testing.assert_close(dense, with_reward, **CLOSE)


def test_the_student_s_top_k_is_a_lower_bound_that_grows_to_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    log_p, logits = (torch.randn(20, 9, generator=generator, dtype=F64).log_softmax(-1) for _ in range(2))
    batch = Batch.from_examples([Example([1], [3] * 20, "student")], 0)
    before = torch.zeros(20, dtype=F64)
    for k in range(1, 10):
        leaf = logits.clone().requires_grad_()
        log_q = leaf.log_softmax(-1)
        value = OPD(student_top_k=k).loss(*(Scores(batch.tokens, Dense(x)) for x in (log_p, log_q)), batch)
        assert (value >= before - 1e-12).all()
        before = value.detach()
    full = ReverseKL()(log_p, log_q)
    torch.testing.assert_close(value, full, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (value, full)))


def test_early_tokens_count_more_with_a_prefix_weight():
    plain, weighted = expected(OPD())[1].view(9, 2), expected(OPD(prefix_weight=0.5))[1].view(9, 2)
    share = plain[:, 0].abs() / plain.abs().sum(-1)
    torch.testing.assert_close(weighted[:, 0], 1.5 * plain[:, 0], **CLOSE)
    torch.testing.assert_close(weighted[:, 1], (1 + 0.5 * (1 - share)) * plain[:, 1], **CLOSE)


@pytest.mark.parametrize(
    "options", [{"discount": 0.9, "reduction": "sum"}, {"student_top_k": 3, "reduction": "sequence"}]
)
def test_accumulated_micro_batches_give_the_same_weights(options, tmp_path):
    one, other = whole_and_accumulated(tmp_path, OPD, **options)
    assert difference(weights(one.model), weights(other.model)) < 1e-9


def test_it_learns_from_the_chosen_tokens_alone(tmp_path):
    sampling = short_sampling(n=16)
    run = trainer(tmp_path, OPD(), with_teacher=ChosenTeacher(), sampling=sampling, max_steps=15)
    run.train()
    divergence = logged(run, "sampled_reverse_kl")
    assert sum(divergence[-5:]) < 0.9 * sum(divergence[:5])
    assert logged(run, "beyond_clip") == [0.0] * 15
    with pytest.raises(
        ValueError, match="OPD requires a teacher that provides chosen, and this teacher provides top_k"
    ):
        trainer(tmp_path, OPD(), with_teacher=TopKOnlyTeacher())
    with pytest.raises(ValueError, match="OPD requires a teacher that provides full"):
        trainer(tmp_path, OPD(student_top_k=4), with_teacher=ChosenTeacher())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_weight": 0.0}, "kl_weight above 0"),
        ({"discount": 1.5}, "discount between 0 and 1"),
        ({"clip": 1.0}, "clip between 0 and 1, or null"),
        ({"prefix_weight": -1.0}, "at least 0"),
        ({"discount": 0.5, "student_top_k": 8}, "exclude each other"),
        ({"reduction": "pair"}, "has no pairs"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OPD(**fields)


def test_another_distribution_than_the_student_s_is_refused_where_sampled_tokens_are_used():
    for changes in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match="leave the rollout's temperature at 1"):
            OPD().check_sampling(replace(short_sampling(), **changes))
        OPD(student_top_k=4).check_sampling(replace(short_sampling(), **changes))
