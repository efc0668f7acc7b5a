"""GKD with a reward: its gradient by enumeration, its optimum in closed form, and plain GKD at α = 1."""

from dataclasses import replace

import pytest
import torch
from fakes import BigramTeacher, ragged_examples, tiny
from loop import difference, logged, short_sampling, student, trainer, weights

from understudy.batch import Batch, Example
from understudy.divergences import ForwardKL, ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.methods.gkd import GKD
from understudy.reward import Reward
from understudy.scores import Scores

F64 = torch.float64
P, Q = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
R = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
OPTIMUM = torch.tensor([0.803050, 0.147713, 0.049238], dtype=F64)  # ∝ p exp(((1−α)/α) r) at α = 1/2


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


def expected_loss(method, logits, reward=R):
    """E over one-token responses y ~ sg[q] of the method's loss, whose gradient is that of −J."""
    log_q = logits.log_softmax(-1)
    q = log_q.detach().exp()
    baseline = float(q @ reward)
    examples = [Example([1], [v], "student", streams={"advantage": [float(reward[v]) - baseline]}) for v in range(3)]
    batch = Batch.from_examples(examples, 0)
    student = Scores(batch.tokens, Dense(log_q.expand(3, 3)))
    teacher = Scores(batch.tokens, Dense(P.log().expand(3, 3)))
    return (q * method.loss(teacher, student, batch)).sum()


def joined(alpha, divergence=None):
    return GKD(divergence=divergence or ReverseKL(), distillation=alpha, reward=Reward([short]))


def test_the_expected_gradient_is_the_objective_s():
    """∇(−J) at α = ½ with the reverse KL, worked by hand."""
    logits = Q.log().requires_grad_()
    expected_loss(joined(0.5), logits).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.226389, 0.086388, 0.140001], dtype=F64), rtol=0, atol=1e-6)


def test_training_a_one_token_policy_reaches_the_optimum_in_closed_form():
    logits = Q.log().requires_grad_()
    method = joined(0.5)
    for _ in range(1500):
        [gradient] = torch.autograd.grad(expected_loss(method, logits), logits)
        logits.data -= gradient
    torch.testing.assert_close(logits.detach().softmax(-1), OPTIMUM, rtol=0, atol=1e-6)


def test_without_a_divergence_it_is_reinforcement_learning():
    logits = Q.log().requires_grad_()
    expected_loss(joined(0.0), logits).backward()
    torch.testing.assert_close(logits.grad, -Q * (R - Q @ R))


@pytest.mark.slow
def test_the_loop_with_sampled_responses_reaches_the_optimum_too(tmp_path):
    """One prompt, one token: q* ∝ p exp(((1−α)/α) r) over the whole vocabulary, from 64 samples a step."""

    def even(prompts, responses, rows):
        return [float(r.startswith("w") and int(r[1:]) % 2 == 0) for r in responses]

    table_teacher = BigramTeacher()
    run = trainer(
        tmp_path,
        GKD(divergence=ReverseKL(), distillation=0.5, reward=Reward([even])),
        with_teacher=table_teacher,
        sampling=short_sampling(max_new_tokens=1, n=64),
        examples=[Example([7], [2], row=0)] * 4,
        per_device_train_batch_size=1,
        max_steps=250,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
    )
    run.train()
    reward = torch.tensor([float(v >= 4 and v % 2 == 0) for v in range(53)])
    optimum = (table_teacher.table[7] + reward).softmax(-1)
    with torch.no_grad():
        learned = run.model(torch.tensor([[7]])).logits[0, 0].softmax(-1)
    before = student()(torch.tensor([[7]])).logits[0, 0].softmax(-1)
    assert float((learned - optimum).abs().sum()) / 2 < 0.1 < float((before - optimum).abs().sum()) / 2
    assert abs(float(learned @ reward) - float(optimum @ reward)) < 0.05
    assert float(table_teacher.table[7].exp() @ reward) < float(optimum @ reward) - 0.1


def test_near_alpha_one_it_is_plain_gkd(tmp_path):
    changed = {"optim": "sgd", "learning_rate": 0.1}
    methods = {"plain": GKD(), "rewarded": GKD(distillation=1 - 1e-9, reward=Reward([short]))}
    plain, rewarded = (
        trainer(tmp_path, method, sampling=short_sampling(n=2), **changed) for method in methods.values()
    )
    plain.train()
    rewarded.train()
    assert difference(weights(plain.model), weights(rewarded.model)) < 1e-6
    assert logged(plain) == pytest.approx(logged(rewarded), rel=1e-5)
    assert len(logged(rewarded, "reward")) == 4
    assert not logged(plain, "reward")


def test_fused_and_plain_losses_have_the_same_gradients(tmp_path):
    """The reward's term goes through the one-pass loss, whose row weights contain the advantages."""
    examples = [
        replace(e, author="student", streams={"advantage": [a] * len(e.response)})
        for e, a in zip(ragged_examples(4), (1, -2, 0, 3), strict=True)
    ]
    gradients = []
    for fused in (True, False):
        run = trainer(tmp_path, GKD(divergence=ForwardKL(), distillation=0.3, reward=Reward([short])), student())
        run._fused = fused
        run.weighted_loss(run.model, Batch.from_examples(examples, 0), run.method, diagnose=False).backward()
        gradients.append([p.grad.clone() for p in run.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_student_learns_what_is_rewarded(tmp_path):
    run = trainer(
        tmp_path,
        GKD(distillation=0.2, divergence=ReverseKL(), reward=Reward([short])),
        tiny("llama", seed=1),
        sampling=short_sampling(n=8),
        max_steps=40,
        learning_rate=5e-3,
    )
    run.train()
    reward = logged(run, "reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation": 0.5}, "needs a reward for the rest"),
        ({"reward": Reward([short])}, "no weight at distillation 1: lower distillation, or leave"),
        ({"distillation": 1.5, "reward": Reward([short])}, "distillation between 0 and 1"),
        ({"on_policy": 0.5, "reward": Reward([short])}, "needs on_policy 1"),
        ({"reduction": "token", "reward": Reward([short])}, "reduction sequence"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GKD(**fields)
