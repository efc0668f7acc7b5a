"""A step at its edges against a plain float64 computation: responses of one token, masks, weights of 0, streams."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from fakes import ragged_examples, tiny
from loop import difference, logged, short_sampling, student, trainer, weights

from understudy.batch import Batch, Example, Reduction
from understudy.divergences import JensenShannon, ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.method import Method
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.sft import SFT
from understudy.reward import Reward
from understudy.rollout import Rollout, with_response
from understudy.scores import Scores
from understudy.teachers.local import LocalTeacher

LEARNING_RATE = 0.1
ROUNDING = 1e-8  # weights and streams are float32
UNEQUAL = [
    Example([4], [5], row=0),
    Example([6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2], row=1),
    Example([4, 5], [2], row=2),
    Example([9, 9, 9, 9], [8, 7, 2], row=3, trained=[False, True, False]),
    Example([10], [11, 12, 2], row=4, trained=[True, True, False]),
    Example([4, 6], [5] * 20, row=5, trained=[False] * 19 + [True]),
    Example([21], [22, 2], row=6),
    Example([5, 4, 3], [2], row=7),
]


def stepped(folder, method, examples, size, parts, **options):
    """The student after one step of plain gradient descent, and the loss."""
    run = trainer(
        folder,
        method,
        student().double(),
        LocalTeacher(tiny("llama", width=24, seed=2).double()),
        examples=examples,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=parts,
        max_steps=1,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        max_grad_norm=0,
        **options,
    )
    run.train()
    return weights(run.model), logged(run)[0]


def by_hand(examples, loss_of_examples):
    """The same from `loss_of_examples(examples, p, q)`, with the two models' log-probabilities of each response."""
    model, local = student().double(), tiny("llama", width=24, seed=2).double()
    rows = []
    for example in examples:
        ids, start = torch.tensor([example.prompt + example.response]), len(example.prompt) - 1
        log_p, log_q = (m(ids).logits[0, start : len(example) - 1].log_softmax(-1) for m in (local, model))
        rows.append((log_p.detach(), log_q))
    loss = loss_of_examples(examples, rows)
    loss.backward()
    return {name: p.detach() - LEARNING_RATE * p.grad for name, p in model.named_parameters()}, float(loss.detach())


def chosen(log_probs, example):
    return log_probs[torch.arange(len(example.response)), torch.tensor(example.response)]


def mask(example):
    return torch.tensor(example.trained or [True] * len(example.response))


def jensen_shannon(log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2


def reduced(values, reduction):
    """The mean over examples of means, over tokens, or over examples of sums; `values` are those of trained tokens."""
    if reduction == "token":
        return torch.cat(values).mean()
    return sum(v.mean() if reduction == "sequence" else v.sum() for v in values) / len(values)


VALUES = {
    "sft": (SFT, lambda e, p, q: -chosen(q, e)),
    "kd": (KD, lambda e, p, q: (p.exp() * (p - q)).sum(-1)),
    "gkd": (lambda reduction: GKD(0.0, "step", JensenShannon(), reduction), lambda e, p, q: jensen_shannon(p, q)),
}


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("name", VALUES)
def test_unequal_lengths_and_masks_in_every_cut(name, reduction, tmp_path):
    make, value = VALUES[name]

    def loss(examples, rows):
        values = [value(e, p, q)[mask(e)] for e, (p, q) in zip(examples, rows, strict=True)]
        return reduced(values, reduction)

    expected, expected_loss = by_hand(UNEQUAL, loss)
    for size, parts in ((8, 1), (2, 4), (1, 8)):
        changed, logged_loss = stepped(tmp_path, make(reduction=reduction), UNEQUAL, size, parts)
        assert logged_loss == pytest.approx(expected_loss, rel=1e-6)
        assert difference(changed, expected) < ROUNDING


@dataclass
class Fixed(Rollout):
    """Responses from a list, by row, n of them for each prompt."""

    responses: dict
    author: str = "student"

    def bind(self, model, tokenizer, author="student"):
        return replace(self, author=author)

    def generate(self, prompts, sampling, step):
        tokens = [(e, t) for e in prompts for t in self.responses[self.author][e.row]]
        return [with_response(e, t, self.author, truncated=t[-1] != 2) for e, t in tokens]


OWN = {"student": {0: [[5], [2]], 1: [[6, 7, 8, 9, 10, 11, 12, 2], [6, 2]], 2: [[4, 4, 4], [4, 5, 6]], 3: [[2], [2]]}}
OWN["teacher"] = {row: [list(reversed(t)) for t in both] for row, both in OWN["student"].items()}


def longer(prompts, responses, rows):
    """2 for each word; the responses to the last two rows are rewarded alike, so their advantages are 0."""
    return [2.0 * len(r.split()) for r in responses]


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_reward_whose_advantages_are_zero_in_a_micro_batch(alpha, tmp_path):
    prompts = ragged_examples(4, responses=False)
    method = GKD(divergence=ReverseKL(), distillation=alpha, reward=Reward([longer]))

    def loss(examples, rows):
        rewards = [2.0 * sum(t != 2 for t in e.response) for e in examples]
        total = 0.0
        for i, (e, (p, q)) in enumerate(zip(examples, rows, strict=True)):
            advantage = rewards[i] - rewards[i ^ 1]
            divergence = (q.exp() * (q - p)).sum(-1).mean()
            total = total - (1 - alpha) * advantage * chosen(q, e).sum() + alpha * divergence
        return total / len(examples)

    examples = [replace(e, response=t) for e in prompts for t in OWN["student"][e.row]]
    expected, expected_loss = by_hand(examples, loss)
    for size, parts in ((4, 1), (1, 4)):
        options = {"rollout": Fixed(OWN), "sampling": short_sampling(n=2)}
        changed, logged_loss = stepped(tmp_path, method, prompts, size, parts, **options)
        assert logged_loss == pytest.approx(expected_loss, rel=1e-6)
        assert difference(changed, expected) < ROUNDING


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_pairs_of_one_token_with_and_without_a_corpus(weight, tmp_path):
    prompts = ragged_examples(4, responses=False)
    corpus = [Example([1], [4, 5, 2], "corpus")]  # one text, so that every draw is this one
    beta = 0.7

    def loss(examples, rows):
        means = [chosen(q, e).mean() for e, (_, q) in zip(examples, rows, strict=True)]
        ratios = [(chosen(q, e) - chosen(p, e)).mean() for e, (p, q) in zip(examples, rows, strict=True)]
        pairs = [-torch.nn.functional.logsigmoid(beta * (ratios[2 * i] - ratios[2 * i + 1])) for i in range(8)]
        return sum(pairs) / 8 - weight * means[16]

    examples = [
        replace(e, response=OWN[author][e.row][i])
        for e in prompts
        for i in range(2)
        for author in ("teacher", "student")
    ]
    expected, expected_loss = by_hand([*examples, *corpus], loss)
    for size, parts in ((4, 1), (1, 4)):
        options = {"rollout": Fixed(OWN), "sampling": short_sampling(n=2), "options": {"corpus": corpus}}
        method = DPKD(beta=beta, lm_weight=weight)
        changed, logged_loss = stepped(tmp_path, method, prompts, size, parts, **options)
        assert logged_loss == pytest.approx(expected_loss, rel=1e-6)
        assert difference(changed, expected) < ROUNDING


@dataclass
class Weighted(Method):
    """Maximum likelihood in which the tokens of a row count its number, 0 for the first."""

    reduction: Reduction = "token"

    @property
    def requires(self):
        return frozenset()

    def loss(self, teacher, student, batch):
        factor = batch.stream("factor")
        return -factor * student.reweighted(factor).chosen


def test_a_micro_batch_in_which_every_weight_is_zero(tmp_path):
    examples = [replace(e, streams={"factor": [float(e.row // 4)] * len(e.response)}) for e in UNEQUAL]

    def loss(examples, rows):
        values = [-(e.row // 4) * chosen(q, e)[mask(e)] for e, (_, q) in zip(examples, rows, strict=True)]
        return torch.cat(values).mean()

    expected, expected_loss = by_hand(examples, loss)
    for size, parts in ((8, 1), (1, 8)):
        changed, logged_loss = stepped(tmp_path, Weighted(), examples, size, parts)
        assert logged_loss == pytest.approx(expected_loss, rel=1e-6)
        assert difference(changed, expected) < ROUNDING
    nothing = [replace(e, streams={"factor": [0.0] * len(e.response)}) for e in UNEQUAL]
    unchanged, zero = stepped(tmp_path, Weighted(), nothing, 2, 4)
    assert zero == 0
    assert difference(unchanged, weights(student().double())) == 0


def test_a_stream_that_some_examples_lack_is_refused_with_the_row(tmp_path):
    some = [replace(e, streams={"factor": [1.0] * len(e.response)} if e.row != 3 else {}) for e in UNEQUAL]
    with pytest.raises(ValueError, match=r'the stream "factor".*the example of row 3 has none'):
        stepped(tmp_path, Weighted(), some, 8, 1)
    short = [replace(e, streams={"factor": [1.0]}) for e in UNEQUAL]
    with pytest.raises(ValueError, match="has 1 numbers for 12 tokens"):
        stepped(tmp_path, Weighted(), short[1:2], 1, 1)


def test_an_engine_s_empty_response_is_refused_with_the_row(tmp_path):
    empty = {"student": {**OWN["student"], 2: [[]]}}
    options = {"rollout": _Silent(empty), "sampling": short_sampling()}
    with pytest.raises(ValueError, match="the example of row 2 has an empty response; every example needs both"):
        stepped(tmp_path, GKD(), ragged_examples(4, responses=False), 4, 1, **options)


class _Silent(Fixed):
    def generate(self, prompts, sampling, step):
        tokens = [(e, self.responses["student"][e.row][0]) for e in prompts]
        return [with_response(e, t, "student", truncated=False) for e, t in tokens]


def test_a_token_that_both_models_exclude_costs_nothing():
    """−∞ log-probabilities: value and gradient are numbers."""
    batch = Batch.from_examples([Example([1], [0, 2])], 0)
    logits = torch.tensor([[0.3, -math.inf, 0.1], [0.0, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.2, -math.inf, 0.5]] * 2, dtype=torch.float64).log_softmax(-1)
    value = GKD().loss(Scores(batch.tokens, Dense(p)), Scores(batch.tokens, Dense(logits.log_softmax(-1))), batch)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad[:, [0, 2]]).all()
