"""The loss on held-out data: the same for every batch size and coin, in the parts that a method names."""

from dataclasses import dataclass, replace

import pytest
from fakes import ragged_examples
from loop import logged, trainer

from understudy.batch import Batch, Example
from understudy.divergences import ReverseKL
from understudy.method import Method
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.reward import Reward
from understudy.step import Step

HELD_OUT = ragged_examples(7, seed=9)
CORPUS = [Example([1], [4 + i, 5 + i % 7, 2], "corpus", row=i) for i in range(20)]


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


def held_out(folder, method, examples=HELD_OUT, size=4, **options):
    options = {"eval_dataset": examples, **options}
    return trainer(folder, method, options=options, per_device_eval_batch_size=size).evaluate()


@pytest.mark.parametrize("mix", ["step", "example"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gkd_is_evaluated_on_its_own_responses_and_on_the_dataset_whatever_the_coin_says(mix, seed, tmp_path):
    options = {"eval_dataset": HELD_OUT}
    mixed = trainer(tmp_path, GKD(on_policy=0.3, mix=mix), options=options, seed=seed).evaluate()
    own = trainer(tmp_path, GKD(), options=options, seed=seed).evaluate()
    fixed = trainer(tmp_path, KD(GKD().divergence, reduction="sequence"), options=options, seed=seed).evaluate()
    assert mixed["eval_loss_on_policy"] == own["eval_loss"]
    assert mixed["eval_loss_dataset"] == pytest.approx(fixed["eval_loss"], rel=1e-6)
    for name in ("loss", "forward_kl", "tokens", "response_length"):
        expected = 0.3 * own[f"eval_{name}"] + 0.7 * fixed[f"eval_{name}"]
        assert mixed[f"eval_{name}"] == pytest.approx(expected, rel=1e-6), name
        assert mixed[f"eval_{name}_on_policy"] == own[f"eval_{name}"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_part_that_is_not_trained_on_is_measured_where_it_can_be(share, tmp_path):
    metrics = held_out(tmp_path, GKD(on_policy=share))
    trained, other = ("on_policy", "dataset") if share else ("dataset", "on_policy")
    assert metrics["eval_loss"] == metrics[f"eval_loss_{trained}"] != metrics[f"eval_loss_{other}"]
    some = [replace(e, response=[]) if e.row > 2 else e for e in HELD_OUT]
    if share:
        partly = held_out(tmp_path, GKD(), some)
        assert partly["eval_loss"] == metrics["eval_loss"]
        assert partly["eval_loss_dataset"] == held_out(tmp_path, GKD(), HELD_OUT[:3])["eval_loss_dataset"]
        none = held_out(tmp_path, GKD(), [replace(e, response=[]) for e in HELD_OUT])
        assert none["eval_loss"] == metrics["eval_loss"]
        assert "eval_loss_dataset" not in none


@pytest.mark.parametrize(
    "make",
    [
        lambda: GKD(on_policy=0.5, mix="example"),
        lambda: GKD(distillation=0.5, divergence=ReverseKL(), reward=Reward([short])),
        DPKD,
        lambda: DPKD(refresh=0),
    ],
    ids=["gkd", "gkd with a reward", "dpkd", "dpkd that keeps responses"],
)
def test_nothing_depends_on_the_size_of_a_batch(make, tmp_path):
    one, *others = (held_out(tmp_path, make(), size=size, corpus=CORPUS) for size in (1, 3, 8))
    for other in others:
        for name in ("eval_loss", "eval_forward_kl", "eval_tokens"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_dpkd_reads_another_text_of_the_corpus_for_every_row(tmp_path):
    """The loss is that of the pairs, and λ times the mean over the texts, each drawn by its row."""
    run = trainer(tmp_path, DPKD(lm_weight=0.5), options={"eval_dataset": HELD_OUT, "corpus": CORPUS})
    collected = run.method.collect(HELD_OUT, run.writers, Step(0, run.args.seed))
    texts = [e for e in collected if e.author == "corpus"]
    assert len(texts) == len(HELD_OUT)
    assert len({e.row for e in texts}) > 3
    of_texts = run.weighted_loss(run.model, Batch.from_examples(texts, 0), run.method, diagnose=False).detach()
    plain = held_out(tmp_path, DPKD())["eval_loss"]
    assert run.evaluate()["eval_loss"] == pytest.approx(plain + float(of_texts) / len(texts), rel=1e-5)


@pytest.mark.parametrize("refresh", [0, 3])
def test_an_evaluation_of_dpkd_generates_anew_and_leaves_training_as_it_is(refresh, tmp_path):
    """Also where the held-out rows are those of the training set."""
    examples = ragged_examples(8)
    options = {"options": {"eval_dataset": examples}, "examples": examples, "eval_strategy": "steps", "eval_steps": 2}
    evaluated = trainer(tmp_path / "one", DPKD(refresh=refresh), **options)
    evaluated.train()
    plain = trainer(tmp_path / "two", DPKD(refresh=refresh), examples=examples)
    plain.train()
    assert logged(evaluated) == logged(plain)
    always_new = trainer(tmp_path / "three", DPKD(), evaluated.model, **options).evaluate()
    assert evaluated.evaluate()["eval_loss"] == always_new["eval_loss"] == logged(evaluated, "eval_loss")[-2]


@dataclass
class Named(Method):
    """Logs the mean surprise under a name."""

    name: str = "surprise"

    @property
    def requires(self):
        return frozenset()

    def loss(self, teacher, student, batch):
        return -student.chosen

    def metrics(self, teacher, student, batch):
        if not self.name:
            return None
        return {self.name: -student.chosen, "shortest": min(map(len, batch.examples))}


@pytest.mark.parametrize("name", ["loss", "tokens", "forward_kl", "truncated", "seconds_learn", "eval_loss"])
def test_a_method_s_metric_does_not_hide_one_of_the_trainer(name, tmp_path):
    with pytest.raises(ValueError, match=f'Named.metrics returns "{name}".*rename it'):
        trainer(tmp_path, Named(name)).train()


def test_a_response_metric_does_not_hide_one_of_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="a response metric is named loss"):
        held_out(tmp_path, KD(), response_metrics=lambda student: {"loss": 1.0})


def test_what_are_no_metrics_is_refused_with_the_name_of_the_method(tmp_path):
    with pytest.raises(ValueError, match=r"Named\.metrics should return a dictionary of tensors, not NoneType"):
        trainer(tmp_path, Named("")).train()


def test_a_method_s_metrics_may_be_numbers(tmp_path):
    run = trainer(tmp_path, Named())
    run.train()
    assert logged(run, "surprise") == pytest.approx(logged(run), rel=1e-4)
    assert min(logged(run, "shortest")) >= 2


@dataclass
class Returning(Method):
    value: str

    @property
    def requires(self):
        return frozenset()

    def loss(self, teacher, student, batch):
        return {"number": 1.0, "constant": student.chosen.detach()}[self.value]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [("number", "loss should return a tensor, not float"), ("constant", "loss returned values without a gradient")],
)
def test_what_is_no_loss_is_refused_with_the_name_of_the_method(value, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"Returning.{sentence}"):
        trainer(tmp_path, Returning(value)).train()
