"""Routed teachers and mixtures: each row's teacher alone, the enumerated average, choices, turns, recipes, runs."""

import json
from dataclasses import replace

import pytest
import torch
from fakes import VOCABULARY, BigramTeacher, ChosenTeacher, TopKOnlyTeacher, TopKTeacher, ragged_examples, tiny
from folders import described, jsonl, llama, sums, write
from loop import difference, logged, student, trainer, weights, whole_and_accumulated

from understudy import distill, load
from understudy.batch import Batch
from understudy.divergences import ForwardKL, JensenShannon
from understudy.evaluation.distance import distances
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.opd import OPD
from understudy.models.forward import score
from understudy.recipe import RecipeError
from understudy.scores import divergence_metrics, metrics_by_teacher
from understudy.teacher import Capability, Teacher
from understudy.teachers.local import LocalTeacher
from understudy.teachers.mixture import MixtureTeacher
from understudy.teachers.routed import RoutedTeacher

SOURCES = ("math", "chat", "math", "code", "chat")
EXAMPLES = [replace(e, columns={"source": s}) for e, s in zip(ragged_examples(5, seed=3), SOURCES, strict=True)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def local(kind="llama", seed=0, width=16, double=False, vocabulary=VOCABULARY):
    model = tiny(kind, seed=seed, width=width, vocabulary=vocabulary)
    return LocalTeacher(model.double() if double else model)


def teachers():
    """Of every kind: live models of two widths, one soft-capped, and one that is known by its top tokens."""
    return {"math": local(width=24), "chat": local("gemma2", seed=2), "code": TopKTeacher()}


def value_and_gradients(teacher, divergence, examples=EXAMPLES, fused=True, weighted=True, double=False):
    """(N,) divergences of a student, and the gradients of their weighted sum."""
    model, batch = (student().double() if double else student()), Batch.from_examples(examples, 0)
    rows = []
    scores = teacher.score(batch).cut(VOCABULARY)

    def loss(own):
        rows.append(scores.divergence_to(own, divergence))
        return (batch.weights("sequence") * rows[0]).sum()

    weighted = batch.weights("sequence") if weighted else None
    score(model, batch, loss, fused=fused, weights=weighted, vocabulary=VOCABULARY).backward()
    return rows[0].detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_each_row_has_the_scores_of_its_teacher_alone(fused):
    own, divergence = teachers(), JensenShannon(0.3)
    values, gradients = value_and_gradients(RoutedTeacher(own, by="source"), divergence, fused=fused)
    alone = {name: value_and_gradients(teacher, divergence, fused=fused)[0] for name, teacher in own.items()}
    batch = Batch.from_examples(EXAMPLES, 0)
    names = [SOURCES[i] for i in batch.sequence_ids.tolist()]
    expected = torch.stack([alone[name][n] for n, name in enumerate(names)])
    torch.testing.assert_close(values, expected, **CLOSE)
    parts = [
        value_and_gradients(own[name], divergence, [e for e in EXAMPLES if e.columns["source"] == name], fused)[1]
        for name in own
    ]
    for gradient, *of_each in zip(gradients, *parts, strict=True):
        torch.testing.assert_close(gradient, sum(of_each), rtol=1e-4, atol=1e-6)
    chosen = {name: teacher.score(batch).chosen for name, teacher in own.items()}
    expected = torch.stack([chosen[name][n] for n, name in enumerate(names)])
    torch.testing.assert_close(RoutedTeacher(own, by="source").score(batch).chosen, expected, **CLOSE)


def test_one_routed_teacher_is_that_teacher():
    for teacher in (local(width=24), local(vocabulary=64), BigramTeacher(), TopKTeacher()):
        routed = RoutedTeacher({"only": teacher}, weights={"only": 1.0})
        for options in ({}, {"weighted": False}):
            one, other = (value_and_gradients(t, ForwardKL(), **options) for t in (routed, teacher))
            torch.testing.assert_close(one, other, **CLOSE)


def test_teachers_with_every_token_have_the_log_probabilities_of_their_rows_in_any_slice():
    own = {"math": local(width=24), "chat": BigramTeacher(), "code": local(vocabulary=64)}
    batch = Batch.from_examples(EXAMPLES, 0)
    routed = RoutedTeacher(own, by="source").score(batch).cut(VOCABULARY)
    alone = {name: teacher.score(batch).cut(VOCABULARY).log_probs for name, teacher in own.items()}
    expected = torch.stack([alone[SOURCES[i]][n] for n, i in enumerate(batch.sequence_ids.tolist())])
    torch.testing.assert_close(routed.log_probs, expected, **CLOSE)
    for rows in (slice(3, 11), slice(0, 1), slice(7, 999)):
        torch.testing.assert_close(
            routed.distribution.log_probs(rows, 2.0), (expected[rows] / 2).log_softmax(-1), **CLOSE
        )
    with pytest.raises(ValueError, match="different numbers of log-probabilities per token"):
        _ = RoutedTeacher(teachers(), by="source").score(batch).log_probs


def test_share_and_kl_of_each_teacher_are_those_of_its_rows():
    batch = Batch.from_examples(EXAMPLES, 0)
    scores, own = RoutedTeacher(teachers(), by="source").score(batch), LocalTeacher(student()).score(batch)
    values = divergence_metrics(scores, own)
    by_teacher = metrics_by_teacher(scores, values)
    for name, teacher in teachers().items():
        rows = torch.tensor([SOURCES[i] == name for i in batch.sequence_ids.tolist()])
        alone = divergence_metrics(teacher.score(batch), own)
        assert torch.equal(by_teacher[f"share_{name}"], rows.float())
        for kl in ("forward_kl", "reverse_kl"):
            torch.testing.assert_close(by_teacher[f"{kl}_{name}"], alone[kl][rows], **CLOSE)
            torch.testing.assert_close(values[kl][rows], alone[kl][rows], **CLOSE)
    assert metrics_by_teacher(teachers()["math"].score(batch), values) == {}
    assert {"forward_kl", "student_entropy"} <= distances(
        student(), RoutedTeacher(teachers(), by="source"), EXAMPLES, 53
    ).sums.keys()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixture_is_the_enumerated_average_with_its_gradient(temperature):
    own = {"a": local(width=24, double=True), "b": local("gpt2", seed=2, double=True, vocabulary=64)}
    mixture, batch = MixtureTeacher(own, weights={"a": 3.0, "b": 1.0}), Batch.from_examples(EXAMPLES, 0)
    a, b = (teacher.score(batch).cut(VOCABULARY).log_probs.exp() for teacher in own.values())
    average = 0.75 * a + 0.25 * b
    scores = mixture.score(batch).cut(VOCABULARY)
    torch.testing.assert_close(scores.log_probs.exp(), average)
    torch.testing.assert_close(scores.chosen.exp(), average.gather(-1, batch.tokens[:, None])[:, 0])
    divergence = JensenShannon(0.3, temperature=temperature)
    values, gradients = value_and_gradients(mixture, divergence, double=True)
    model = student().double()
    log_q = LocalTeacher(model).score(batch)  # freezes it
    model.requires_grad_(True).train()
    expected = []

    def loss(own_scores):
        expected.append(divergence(average.log(), own_scores.log_probs))
        return (batch.weights("sequence") * expected[0]).sum()

    score(model, batch, loss, fused=False).backward()
    assert log_q.log_probs.shape == average.shape
    torch.testing.assert_close(values, expected[0].detach(), rtol=1e-9, atol=1e-12)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=1e-11)


def test_a_mixture_of_teachers_of_the_chosen_token_is_the_average_of_that_alone():
    batch, own = Batch.from_examples(EXAMPLES, 0), {"a": ChosenTeacher(), "b": TopKTeacher(), "c": local()}
    mixture = MixtureTeacher(own)
    assert mixture.provides == {Capability.CHOSEN}
    expected = sum(teacher.score(batch).chosen.exp() for teacher in own.values()) / 3
    torch.testing.assert_close(mixture.score(batch).chosen.exp(), expected, **CLOSE)
    with pytest.raises(ValueError, match="top tokens of several teachers are not the same"):
        MixtureTeacher({"a": TopKOnlyTeacher(), "b": local()})


def test_mixtures_and_routed_teachers_nest():
    math = MixtureTeacher({"large": local(width=24), "small": BigramTeacher()})
    nested = RoutedTeacher({"math": math, "chat": local(), "code": TopKTeacher()}, by="source")
    values, _ = value_and_gradients(nested, ForwardKL())
    rows = torch.tensor([SOURCES[i] == "math" for i in Batch.from_examples(EXAMPLES, 0).sequence_ids.tolist()])
    torch.testing.assert_close(values[rows], value_and_gradients(math, ForwardKL())[0][rows], **CLOSE)
    assert list(nested.parts()) == [
        "teachers.math.teachers.large",
        "teachers.math.teachers.small",
        "teachers.chat",
        "teachers.code",
    ]
    routed = RoutedTeacher({"math": local(width=24), "chat": local(), "code": BigramTeacher()}, by="source")
    mixed = MixtureTeacher({"routed": routed, "other": BigramTeacher(seed=4)}).score(Batch.from_examples(EXAMPLES, 0))
    parts = (t.score(Batch.from_examples(EXAMPLES, 0)).log_probs.exp() for t in (routed, BigramTeacher(seed=4)))
    torch.testing.assert_close(mixed.log_probs.exp(), sum(parts) / 2, **CLOSE)


# Which teacher


def test_by_weight_the_choice_is_a_function_of_seed_and_row():
    own = {"a": BigramTeacher(seed=1), "b": BigramTeacher(seed=2)}
    names = [
        [RoutedTeacher(own, weights={"a": 3.0, "b": 1.0}, seed=s)._name(e) for e in ragged_examples(400)]
        for s in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    assert abs(names[0].count("a") / 400 - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    routed = RoutedTeacher(own, weights={"a": 3.0, "b": 1.0})
    assert [routed._name(replace(e, response=[9, 2], prompt=[4])) for e in ragged_examples(400)] == names[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"source": "law"}, 'the column source, in which row 0 has "law": name one of math, chat, code there'),
        ({}, "the column source, in which row 0 has nothing: name one of"),
    ],
)
def test_a_row_that_names_no_teacher_is_refused_when_data_are_read(columns, message, tmp_path):
    examples = [*EXAMPLES[1:], replace(EXAMPLES[0], columns=columns)]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, KD(), with_teacher=RoutedTeacher(teachers(), by="source"), examples=examples)


def test_what_one_of_the_teachers_needs_and_cannot_do_holds_for_all_of_them(tmp_path):
    """Each is told the student's tokenizer, and with one that has stored scores only, nothing new can be scored."""

    class Stored(BigramTeacher):
        scores_new_responses = False
        tokenizer = None

        def setup(self, tokenizer):
            self.tokenizer = tokenizer

    own = {"math": Stored(), "chat": BigramTeacher(), "code": BigramTeacher()}
    routed = RoutedTeacher(own, by="source")
    run = trainer(tmp_path, KD(), with_teacher=routed, examples=EXAMPLES)
    assert own["math"].tokenizer is run.processing_class
    assert not routed.scores_new_responses
    assert RoutedTeacher({"chat": BigramTeacher()}, by="source").scores_new_responses
    with pytest.raises(ValueError, match="this teacher has only stored scores"):
        trainer(tmp_path, GKD(on_policy=1.0), with_teacher=routed, examples=EXAMPLES)


def test_settings_that_do_not_fit_are_refused():
    own = {"a": BigramTeacher(), "b": BigramTeacher()}
    for make, message in (
        (lambda: RoutedTeacher({}, by="source"), "at least one teacher"),
        (lambda: RoutedTeacher(own), "either `by`"),
        (lambda: RoutedTeacher(own, by="source", weights={"a": 1.0, "b": 1.0}), "either `by`"),
        (lambda: RoutedTeacher(own, weights={"a": 1.0}), "a number above 0 for each of the teachers a, b"),
        (lambda: MixtureTeacher(own, weights={"a": 1.0, "b": 0.0}), "a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_routed_teacher_provides_what_all_of_its_teachers_do(tmp_path):
    assert RoutedTeacher(teachers(), by="source").provides == {Capability.CHOSEN, Capability.TOP_K}
    chosen = RoutedTeacher({"a": ChosenTeacher(), "b": local()}, weights={"a": 1.0, "b": 1.0})
    assert chosen.provides == {Capability.CHOSEN}
    with pytest.raises(
        ValueError, match="GKD requires a teacher that provides top_k, and this teacher provides chosen"
    ):
        trainer(tmp_path, GKD(), with_teacher=chosen)
    run = trainer(tmp_path, OPD(), with_teacher=chosen, max_steps=1)
    run.train()
    assert logged(run, "share_a")[0] + logged(run, "share_b")[0] == pytest.approx(1.0)


# In training


class Places(Teacher):
    """A teacher that notes where it is moved and what it scores."""

    provides = BigramTeacher.provides

    def __init__(self, log, name):
        self.log, self.name, self.teacher = log, name, BigramTeacher()

    def to(self, device):
        self.log.append((self.name, device.type))

    def score(self, batch):
        self.log.append((self.name, len(batch.examples)))
        return self.teacher.score(batch)


def test_offloaded_teachers_take_turns_once_per_step():
    log, own = [], {}
    own |= {name: Places(log, name) for name in ("math", "chat", "code")}
    routed = RoutedTeacher(own, by="source", offload=True)
    routed.to(torch.device("meta"))
    batches = [Batch.from_examples(EXAMPLES[:3], 0), Batch.from_examples(EXAMPLES[3:], 0)]
    routed.prefetch(batches)
    assert log[:3] == [("math", "cpu"), ("chat", "cpu"), ("code", "cpu")]
    assert log[3:7] == [("math", "meta"), ("math", 2), ("math", "cpu"), ("chat", "meta")]
    assert log[7:] == [("chat", 1), ("chat", 1), ("chat", "cpu"), ("code", "meta"), ("code", 1), ("code", "cpu")]
    count = len(log)
    direct = RoutedTeacher(own, by="source")
    for batch in batches:
        assert torch.equal(
            routed.score(batch).log_probs, direct.score(Batch.from_examples(batch.examples, 0)).log_probs
        )
    assert log[count:] == [("math", 2), ("chat", 1), ("chat", 1), ("code", 1)], "scored by the direct one alone"


def test_the_choice_and_the_weights_do_not_depend_on_accumulation_or_turns(tmp_path):
    routed = []
    for offload in (False, True):
        own = {"a": local(width=24, double=True), "b": local("gpt2", seed=2, double=True)}
        routed.append(RoutedTeacher(own, weights={"a": 1.0, "b": 2.0}, offload=offload))
    runs = whole_and_accumulated(tmp_path, GKD, routed)
    assert difference(*(weights(run.model) for run in runs)) < 1e-9
    for name in ("share_a", "forward_kl_a", "reverse_kl_b"):
        one, other = (logged(run, name) for run in runs)
        assert len(one) == 3
        assert one == pytest.approx(other, rel=1e-5)


def test_a_teacher_that_is_divided_among_processes_is_not_routed_to():
    """ZeRO-3 marks the parameters, each of which is gathered by all processes together."""
    own = {"a": local(), "b": local(seed=1)}
    next(iter(own["b"].model.parameters())).ds_id = 0
    with pytest.raises(ValueError, match="a process without rows for a sharded teacher would block the others"):
        RoutedTeacher(own, weights={"a": 1.0, "b": 1.0})


# In a recipe


def test_a_resumed_run_notices_that_rows_have_other_teachers(tmp_path):
    models = {name: {"local": {"model": str(llama(tmp_path / name, seed))}} for seed, name in enumerate("ab")}
    rows = [json.loads(line) for line in sums(tmp_path / "sums.jsonl").read_text().splitlines()]

    def run(steps, first="a"):
        jsonl(tmp_path / "sums.jsonl", [{**row, "from": "b" if n else first} for n, row in enumerate(rows)])
        content = described(tmp_path, method="kd", teacher={"routed": {"by": "from", "teachers": models}})
        content["training"] |= {"lr_scheduler_type": "constant", "max_steps": steps}
        content |= {"student": {"model": str(tmp_path / "a")}}
        return distill(load(write(tmp_path / "mine.yaml", content)))

    run(1)
    with pytest.raises(RecipeError, match=r"the column from of the training data .*sums\.jsonl has changed"):
        run(2, first="b")
    assert run(2)["steps"] == 2


def test_several_teachers_run_from_a_recipe_and_errors_have_the_line(tmp_path):
    models = [str(llama(tmp_path / name, seed)) for seed, name in enumerate(("student", "first", "second"))]
    several = {"teachers": {name: {"local": {"model": m}} for name, m in zip(("a", "b"), models[1:], strict=True)}}
    content = {
        "student": {"model": models[0]},
        "method": "kd",
        "data": {"dataset": str(sums(tmp_path / "sums.jsonl")), "max_length": 24},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
        "evaluate": {"show": 0},
    }
    content["training"] |= {"disable_tqdm": True, "output_dir": str(tmp_path / "run")}
    nested = {"routed": {"weights": {"a": 1, "b": 1}, **several}}
    summary = distill(load(write(tmp_path / "routed.yaml", {**content, "teacher": nested})))
    assert summary["teacher_parameters"] == 2 * summary["student_parameters"]
    line = [text for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "share_a" in text]
    assert line
    bad = {**several["teachers"], "b": {"local": {"modle": "x"}}}
    for fields, message in (
        (
            {"teachers": bad, "weights": {"a": 1, "b": 1}},
            r'line \d+: teacher\.routed\.teachers\.b\.local has no field "modle"',
        ),
        ({"teachers": "a", "by": "x"}, r"line \d+: teacher\.routed\.teachers has a teacher for each name"),
        ({**several, "by": "kind"}, r"line \d+: .*the column kind, in which row 0 has nothing"),
        (
            {"teachers": {"a": "nobody"}, "by": "x"},
            r'line \d+: teacher\.routed\.teachers\.a: there is no teacher "nobody"',
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            distill(load(write(tmp_path / "bad.yaml", {**content, "teacher": {"routed": fields}})), restart=True)
