"""Exposure bias against an enumeration by hand."""

import pytest
import torch
from fakes import VOCABULARY, Tabular, tiny, writer

from understudy.batch import Example
from understudy.evaluation.exposure_bias import exposure_bias
from understudy.fused_linear.distributions import Dense
from understudy.rollouts.generate import GenerateRollout
from understudy.scores import Scores
from understudy.step import Step
from understudy.teacher import Capability, Teacher
from understudy.teachers.local import LocalTeacher

# Two steps over three symbols: the first distribution, and the second after each symbol. The prompt is symbol 0.
P = ([0.6, 0.3, 0.1], [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
Q = ([0.2, 0.5, 0.3], [[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.5, 0.25]])
TENTHS_OF_P, TENTHS_OF_Q = (6, 3, 1), (2, 5, 3)


def table(first, second):
    return {(0,): torch.tensor(first).log(), **{(0, y): torch.tensor(row).log() for y, row in enumerate(second)}}


class Table(Tabular):
    """A model with everything that evaluations need; without a head, so that the loss takes the plain path."""

    def get_output_embeddings(self):
        return None

    def get_input_embeddings(self):
        return type("Embeddings", (), {"weight": self.logits})

    @property
    def config(self):
        return None


class Tables(Teacher):
    provides = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})

    def __init__(self, model):
        self.model = model

    def score(self, batch):
        logits = self.model(batch.input_ids, batch.attention_mask).logits.detach()
        return Scores(batch.tokens, Dense(logits[batch.predicts].log_softmax(-1)))


def samples(tenths, row=0, second=1):
    """Ten samples that have each first symbol as often as its probability says; the second does not matter."""
    return [Example([0], [y, second], row=row) for y, times in enumerate(tenths) for _ in range(times)]


def measured(student_samples, teacher_samples):
    return exposure_bias(
        Table(table(*Q)), Tables(Table(table(*P))), student_samples, teacher_samples, vocabulary=3, batch_size=4
    )


def test_exposure_bias_of_two_enumerated_steps_equals_its_definition():
    result = measured(samples(TENTHS_OF_Q), samples(TENTHS_OF_P))
    assert result.accumulated[1] == pytest.approx(0.668193, abs=1e-6)
    assert result.expected[1] == pytest.approx(0.599976, abs=1e-6), "the KL between whole sequences"
    assert result.percent[0] == pytest.approx(0, abs=1e-4)
    assert result.percent[1] == pytest.approx(11.370014, abs=1e-4)
    assert result.alive.tolist() == result.teacher_alive.tolist() == [10, 10]


def test_only_samples_that_reach_a_position_count_there():
    """A prompt's position that only some samples reach is averaged over these; one that none reaches adds nothing."""
    short = [Example([0], [0], row=0), Example([0], [1, 2], row=0)]
    result = measured(short, [Example([0], [2], row=0), Example([0], [0], row=0)])
    first, after = torch.tensor(P[0]), torch.tensor(P[1][1])
    kl_first = (first * (first / torch.tensor(Q[0])).log()).sum()
    kl_after = (after * (after / torch.tensor(Q[1][1])).log()).sum()
    assert result.accumulated.tolist() == pytest.approx([float(kl_first), float(kl_first + kl_after)], rel=1e-5)
    assert result.expected.tolist() == pytest.approx([float(kl_first)] * 2, rel=1e-5)
    assert result.alive.tolist() == [2, 1]
    assert result.teacher_alive.tolist() == [2, 0]


def test_the_standard_error_is_that_of_a_ratio_of_means():
    """With the same samples for every prompt there is none; with different ones it follows the jackknife."""
    alike = measured(
        [*samples(TENTHS_OF_Q), *samples(TENTHS_OF_Q, row=1)], [*samples(TENTHS_OF_P), *samples(TENTHS_OF_P, row=1)]
    )
    assert alike.standard_error[1] == pytest.approx(0, abs=1e-4)
    generator = torch.Generator().manual_seed(0)

    def draw(first, rows):
        ys = torch.multinomial(torch.tensor(first), len(rows), True, generator=generator).tolist()
        return [Example([0], [y, 0], row=row) for y, row in zip(ys, rows, strict=True)]

    rows = list(range(40))
    student_samples, teacher_samples = draw(Q[0], rows), draw(P[0], rows)
    without = [
        float(
            measured(
                [e for e in student_samples if e.row != row], [e for e in teacher_samples if e.row != row]
            ).percent[1]
        )
        for row in rows
    ]
    jackknife = (39 / 40 * sum((x - sum(without) / 40) ** 2 for x in without)) ** 0.5
    assert float(measured(student_samples, teacher_samples).standard_error[1]) == pytest.approx(jackknife, rel=0.1)
    assert torch.isnan(measured(student_samples[:1], teacher_samples[:1]).standard_error).all()


def test_samples_of_live_models_approach_the_enumeration():
    """Two steps of two random models, whose first tokens are enumerated, against 3000 samples of each."""
    student, teacher = tiny("llama", seed=1), tiny("gpt2", seed=2)
    prompt, draws = Example([5, 6, 7], [], row=0), 3000
    firsts = [Example(prompt.prompt, [y, 4], row=0) for y in range(VOCABULARY)]
    ids = torch.tensor([[*e.prompt, e.response[0]] for e in firsts])
    with torch.no_grad():
        log_q, log_p = (m(ids).logits[:, -2:].double().log_softmax(-1) for m in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (first token, step)
    never_stops = torch.arange(VOCABULARY) != 2  # behind a first token that ends the response there is no second
    steps = []
    for log in (log_q, log_p):
        alive = log[0, 0].exp() * never_stops
        steps.append(float(kl[0, 0] + (alive * kl[:, 1]).sum() / alive.sum()))
    exact = 100 * (steps[0] - steps[1]) / steps[1]

    options = {"max_new_tokens": 2, "temperature": 1.0, "batch_size": 1000}
    student_samples = writer(GenerateRollout, student, **options)([prompt] * draws, Step(0, 3))
    teacher_samples = writer(GenerateRollout, teacher, "teacher", **options)([prompt] * draws, Step(0, 3))
    result = exposure_bias(
        student, LocalTeacher(teacher), student_samples, teacher_samples, VOCABULARY, batch_size=1000
    )
    assert abs(exact) > 2, "there is something to be found"
    assert float(result.percent[0]) == pytest.approx(0, abs=1e-3)
    assert float(result.percent[1]) == pytest.approx(exact, abs=1.5)


def test_samples_for_different_prompts_are_refused():
    with pytest.raises(ValueError, match="for the same prompts"):
        measured(samples(TENTHS_OF_Q), samples(TENTHS_OF_P, row=1))
