"""Recipes: reading, overrides, errors with their lines, classes by name, and reading back what `resolved` writes."""

import dataclasses
import multiprocessing
import sys
from pathlib import Path

import pytest
import yaml
from folders import described, write
from transformers import TrainingArguments

from understudy import divergences, metrics
from understudy.budget import Budget
from understudy.divergences import AlphaBeta, ForwardKL, JensenShannon, ReverseKL
from understudy.method import Method
from understudy.methods import METHODS
from understudy.recipe import RecipeError, load, parse
from understudy.recipe.arguments import construct
from understudy.rollouts import ROLLOUTS
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.teachers import TEACHERS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LEAST = {"student": {"model": "some/model"}, "method": "sft", "data": {"dataset": "rows.jsonl"}}


@pytest.fixture
def least(tmp_path):
    return write(tmp_path / "least.yaml", LEAST)


def test_the_shortest_recipe_has_defaults_for_everything_else(least):
    recipe = load(least)
    assert recipe.name == "least"
    assert recipe.teacher is None
    assert recipe.method == ("sft", {})
    assert recipe.rollout == ("generate", {})
    assert recipe.training == {}


@pytest.mark.parametrize(
    ("overrides", "where", "value"),
    [
        (["student.model=other"], ("student", "model"), "other"),
        (["student.peft.r=8"], ("student", "peft"), {"r": 8}),
        (["teacher.local.model=big"], ("teacher",), {"local": {"model": "big"}}),
        (["teacher=local", "teacher.local.model=big"], ("teacher",), {"local": {"model": "big"}}),
        (["method=gkd", "method.gkd.on_policy=0.5"], ("method",), {"gkd": {"on_policy": 0.5}}),
        (["method.sft.reduction=sequence"], ("method",), {"sft": {"reduction": "sequence"}}),
        (["rollout.generate.temperature=0"], ("rollout",), {"generate": {"temperature": 0}}),
        (["data.columns.prompt=en"], ("data", "columns"), {"prompt": "en"}),
        (["data.template={a} = {b}"], ("data", "template"), "{a} = {b}"),
        (["data.limit=null"], ("data", "limit"), None),
        (["training.learning_rate=1e-5"], ("training", "learning_rate"), 1e-5),
        (["training.learning_rate=3E-4"], ("training", "learning_rate"), 3e-4),
        (["training.weight_decay=.1"], ("training", "weight_decay"), 0.1),
        (["training.bf16=true"], ("training", "bf16"), True),
        (["training.report_to=[wandb, trackio]"], ("training", "report_to"), ["wandb", "trackio"]),
        (["training.run_name=a=b"], ("training", "run_name"), "a=b"),
        (["training.lr_scheduler_kwargs={min_lr: 1e-6}"], ("training", "lr_scheduler_kwargs"), {"min_lr": 1e-6}),
        (["evaluate.dataset=test.jsonl"], ("evaluate", "dataset"), "test.jsonl"),
        (["training.seed=1", "training.seed=2"], ("training", "seed"), 2),
    ],
)
def test_overrides_reach_into_every_block_and_make_it_where_it_is_missing(least, overrides, where, value):
    content = load(least, overrides).resolved()
    for key in where:
        content = content.get(key)
    assert content == value
    assert type(content) is type(value)


@pytest.mark.parametrize(
    ("overrides", "where", "value"),
    [
        (["method=mine:Mine", "method.mine:Mine.beta=2"], ("method",), {"mine:Mine": {"beta": 2}}),
        (["method=a.b.mine:Mine", "method.a.b.mine:Mine.beta=2"], ("method",), {"a.b.mine:Mine": {"beta": 2}}),
        (["method={a.mine:Mine: {beta: 1}}", "method.a.mine:Mine.beta=2"], ("method",), {"a.mine:Mine": {"beta": 2}}),
        (["teacher.a.mine:Mine.model=big"], ("teacher",), {"a.mine:Mine": {"model": "big"}}),
        (["teacher={a.mine:Mine: {}}"], ("teacher",), {"a.mine:Mine": {}}),
        (
            ["method.sft.divergence.a.mine:Mine.alpha=0.1"],
            ("method",),
            {"sft": {"divergence": {"a.mine:Mine": {"alpha": 0.1}}}},
        ),
        (
            ["method.sft.divergence.a.mine:Mine.inner.b.mine:Mine.alpha=0.1"],
            ("method", "sft", "divergence"),
            {"a.mine:Mine": {"inner": {"b.mine:Mine": {"alpha": 0.1}}}},
        ),
        (
            ["rollout={a.mine:Mine: {n: 1}}", "rollout.a.mine:Mine.stop.b.mine:Mine=1"],
            ("rollout",),
            {"a.mine:Mine": {"n": 1, "stop": {"b.mine:Mine": 1}}},
        ),
        (
            ["reward.functions.a.mine:good=1", "reward.functions.a.mine:good=2"],
            ("reward", "functions"),
            {"a.mine:good": 2},
        ),
        (["evaluate.metrics=[a.mine:Mine, bleu]"], ("evaluate", "metrics"), ["a.mine:Mine", "bleu"]),
    ],
)
def test_dots_in_the_name_of_a_class_do_not_separate_keys(least, overrides, where, value):
    content = load(least, overrides).resolved()
    for key in where:
        content = content[key]
    assert content == value


def test_an_override_for_another_class_of_ones_own_says_so(least):
    with pytest.raises(
        RecipeError, match=r"is for a.mine:Mine, and the method is sft; .* put \"method=a.mine:Mine\" be"
    ):
        load(least, ["method.a.mine:Mine.beta=2"])


def test_an_error_about_a_class_with_dots_in_its_name_has_the_line_of_the_key(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(LEAST) + "teacher:\n  a.b.mine:Mine:\n    size: 1\n")
    recipe = load(tmp_path / "r.yaml")
    assert str(recipe.error("teacher.a.b.mine:Mine.size", "x")).endswith("r.yaml, line 8: x")
    assert str(recipe.error("teacher.a.b.mine:Mine", "x")).endswith("r.yaml, line 7: x")
    with pytest.raises(
        RecipeError, match=r'line 6: the teacher a.b.mine:Mine cannot be imported: there is no module "a"'
    ):
        recipe.check("teacher", TEACHERS)


OWN_CLASSES = """
from dataclasses import dataclass
from understudy.divergences import Divergence, ReverseKL
from understudy.method import Method
from understudy.metric import Metric, Score
from understudy.rollout import Rollout
from understudy.teacher import Teacher

def concrete(base):  # whatever is abstract
    return type("Concrete", (base,), {name: lambda self, *arguments: None for name in base.__abstractmethods__})

@dataclass(frozen=True)
class MyDivergence(concrete(Divergence)):
    alpha: float = 0.5

@dataclass
class MyMethod(concrete(Method)):
    paper = "mine"
    beta: float = 0.5
    divergence: Divergence = ReverseKL()
    reward: object = None

class MyTeacher(concrete(Teacher)):
    def __init__(self, url: str, *, retries: int = 3):
        self.url, self.retries = url, retries

class MyRollout(concrete(Rollout)):
    def __init__(self, **options):
        self.options = options

class MyMetric(Metric):
    names = ("length", "count")
    def score(self, responses, references):
        return {"length": Score(len(responses[0]), "characters"), "count": Score(len(responses), "responses")}
"""


@pytest.fixture
def own_classes(tmp_path, monkeypatch):
    """A folder with the module `own_classes`, which is the working directory."""
    (tmp_path / "own_classes.py").write_text(OWN_CLASSES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_classes", None)


OWN = {
    "method": {"own_classes:MyMethod": {"beta": 0.1, "divergence": {"own_classes:MyDivergence": {"alpha": 0.2}}}},
    "teacher": {"own_classes:MyTeacher": {"url": "http://localhost", "retries": 5}},
    "rollout": {"own_classes:MyRollout": {"length": 7}},
    "evaluate": {"dataset": "test.jsonl", "metrics": ["own_classes:MyMetric"]},
}


def test_a_recipe_is_built_of_classes_of_ones_own(own_classes):
    recipe = load(write(own_classes / "r.yaml", LEAST | OWN), ["method.own_classes:MyMethod.beta=0.3"])
    method = recipe.build("method", METHODS)
    assert (type(method).__name__, method.beta, method.divergence.alpha) == ("MyMethod", 0.3, 0.2)
    assert recipe.build("method", METHODS, reward="a reward").reward == "a reward"
    teacher = recipe.build("teacher", TEACHERS)
    assert (teacher.url, teacher.retries) == ("http://localhost", 5)
    assert recipe.build("rollout", ROLLOUTS).options == {"length": 7}
    assert parse(recipe.resolved()).resolved() == recipe.resolved()
    scores = metrics.score(recipe.evaluate.metrics, ["four", "x"], [["a"], ["b"]])
    assert {name: score.value for name, score in scores.items()} == {"length": 4, "count": 2}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"method": "own_classes:MyMehtod"}, 'line 3: the module own_classes has no class "MyMehtod"; did you mean'),
        ({"method": "own_clases:MyMethod"}, 'line 3: .* no module "own_clases" in .*; did you mean "own_classes"'),
        ({"method": "own_classes:MyTeacher"}, r"line 3: .* is not a subclass of understudy.method.Method: derive it"),
        ({"method": "own_classes:Method"}, "line 3: the method own_classes:Method is abstract: define loss"),
        ({"method": {"own_classes:MyMethod": {"bta": 1}}}, 'line 5: .*has no field "bta"; did you mean "beta"'),
        ({"method": {"own_classes:MyMethod": {"beta": "x"}}}, "line 5: method.own_classes:MyMethod.beta: .*number"),
        (
            {"method": {"own_classes:MyMethod": {"divergence": "own_classes:MyMethod"}}},
            r"line 5: method.own_classes:MyMethod.divergence: the divergence own_classes:MyMethod is not a subclass of",
        ),
    ],
)
def test_a_mistake_in_the_name_of_ones_own_class_has_its_line(changes, error, own_classes):
    recipe = load(write(own_classes / "r.yaml", LEAST | changes))
    with pytest.raises(RecipeError, match=error):
        recipe.build("method", METHODS)


def test_a_reward_is_not_forced_on_a_method_without_one():
    with pytest.raises(RecipeError, match=r"method\.sft takes no reward"):
        parse(LEAST).build("method", METHODS, reward="a reward")


def build_in_child(path, connection):
    method = load(path).build("method", METHODS)
    connection.send((type(method).__module__, method.beta))


def test_a_class_in_the_working_directory_is_found_by_child_processes(own_classes):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=build_in_child, args=(write(own_classes / "r.yaml", LEAST | OWN), sender))
    child.start()
    sender.close()
    assert receiver.recv() == ("own_classes", 0.1)
    child.join()


def test_a_number_with_an_exponent_is_a_number_in_a_file_too(tmp_path):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(LEAST) + "training: {a: 1e-5, b: -2E+3, c: 1.5e3, d: 1e5x, e: e5}\n"
    )
    assert load(tmp_path / "r.yaml").training == {"a": 1e-5, "b": -2e3, "c": 1.5e3, "d": "1e5x", "e": "e5"}


def test_a_resolved_recipe_is_read_back_as_the_same(tmp_path):
    content = {
        **described(tmp_path),
        "evaluate": {"dataset": "a.jsonl", "limit": None, "show": 0},
        "training": {"max_steps": 3, "lr_scheduler_kwargs": None, "learning_rate": 1e-5},
    }
    recipe = parse(content)
    resolved = recipe.resolved()
    assert parse(resolved).resolved() == resolved
    file = write(tmp_path / "again.yaml", resolved)
    again = load(file)
    assert again.resolved() == resolved
    assert again.evaluate.limit is None
    for word in type(recipe).model_fields:
        assert getattr(again, word) == getattr(recipe, word), word


@pytest.mark.parametrize("budget", [{"tokens": 100_000}, {"seconds": 60.0}])
def test_a_budget_is_read_and_written_and_changed_as_a_whole(budget, tmp_path):
    recipe = load(write(tmp_path / "r.yaml", {**LEAST, "budget": budget}))
    assert recipe.budget == Budget(**budget)
    assert recipe.resolved()["budget"] == budget
    assert parse(recipe.resolved()).budget == recipe.budget
    assert load(tmp_path / "r.yaml", ["budget={seconds: 5}"]).budget == Budget(seconds=5.0)
    assert load(tmp_path / "r.yaml", ["budget=null"]).budget is None
    assert "budget" not in parse(LEAST).resolved()


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ("{tokens: 5, seconds: 5}", "line 4: budget: a budget is of tokens or of seconds, .* and this has both$"),
        ("{}", "and this has neither$"),
        ("{tokens: 0}", "a budget of 0 tokens cannot be spent: give more than 0$"),
        ("{tokens: many}", r"budget\.tokens: input should be a valid integer, .*not 'many'$"),
        ("{tokens: 1.5}", "valid integer"),
        ("{steps: 5}", 'line 4: budget has no field "steps"'),
        ("100000", "budget has fields, written as `budget: {key: value}`, and is not 100000$"),
    ],
)
def test_a_wrong_budget_is_one_sentence_with_its_line(budget, sentence, tmp_path):
    lines = ["student: {model: some/model}", "method: sft", "data: {dataset: rows.jsonl}", f"budget: {budget}"]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=sentence):
        load(tmp_path / "r.yaml")


def test_changing_a_resolved_recipe_changes_no_recipe(tmp_path):
    recipe = parse(described(tmp_path))
    recipe.resolved()["training"]["max_steps"] = 99
    recipe.resolved()["method"]["gkd"]["on_policy"] = 0.9
    assert recipe.training["max_steps"] == 2
    assert recipe.method == ("gkd", {"on_policy": 0.5})


@dataclasses.dataclass
class Example:
    """Something to construct."""

    count: int
    divergence: divergences.Divergence = dataclasses.field(default_factory=ForwardKL)
    other: divergences.Divergence | None = None
    model: Method | str = "none"
    names: list[str] | None = None
    fraction: float = 0.5
    exact: bool = False
    _private: int = 0


@pytest.mark.parametrize(
    ("value", "divergence"),
    [
        ("reverse_kl", ReverseKL()),
        ({"jensen_shannon": {"beta": 0.9}}, JensenShannon(0.9)),
        (
            {"jensen_shannon": {"beta": 0.1, "temperature": 2, "rescale": True}},
            JensenShannon(0.1, temperature=2.0, rescale=True),
        ),
        ({"alpha_beta": {"alpha": 0.2, "beta": 0.7}}, AlphaBeta(0.2, 0.7)),
        ({"forward_kl": None}, ForwardKL()),
    ],
)
def test_a_divergence_is_a_name_or_a_name_with_fields(value, divergence):
    assert construct(Example, {"count": 1, "divergence": value}, "x").divergence == divergence
    assert construct(Example, {"count": 1, "other": value}, "x").other == divergence


def test_every_divergence_can_be_named():
    snakes = {
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "total_variation",
        "skew_kl",
        "skew_reverse_kl",
        "alpha_beta",
    }
    for name in snakes:
        divergence = construct(Example, {"count": 1, "divergence": {name: {"temperature": 2.0}}}, "x").divergence
        assert divergence.temperature == 2.0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, 'x needs "count": add x.count'),
        ({"count": 1.5}, "x.count: .*integer.*not 1.5"),
        ({"count": "many"}, "x.count: .*integer.*not 'many'"),
        ({"count": 1, "fraction": [1]}, r"x.fraction: .*number.*not \[1\]"),
        ({"count": 1, "exact": 7}, "x.exact: .*boolean.*not 7"),
        ({"count": 1, "names": "a"}, "x.names: .*list.*not 'a'"),
        ({"count": 1, "model": 5}, "x.model: .*string.*not 5"),
        ({"count": 1, "cuont": 2}, 'x has no field "cuont"; did you mean "count"'),
        ({"count": 1, "_private": 2}, 'x has no field "_private"'),
        ({"count": 1, "divergence": 3}, "x.divergence: write one name"),
        ({"count": 1, "divergence": {"a": 1, "b": 2}}, "x.divergence: write one name"),
        ({"count": 1, "divergence": None}, "x.divergence: write one name"),
        (
            {"count": 1, "divergence": {"forward_kl": {"beta": 1}}},
            'x.divergence.forward_kl has no field "beta"; there are',
        ),
        ({"count": 1, "divergence": {"forward_kl": {"temperature": 0}}}, "x.divergence.forward_kl: .*above 0"),
    ],
)
def test_fields_are_checked_against_the_constructor(fields, sentence):
    with pytest.raises(RecipeError, match=sentence):
        construct(Example, fields, "x")


def test_an_argument_of_the_caller_is_no_field_of_a_recipe():
    assert construct(Example, {}, "x", count=3).count == 3
    with pytest.raises(RecipeError, match='x has no field "count"'):
        construct(Example, {"count": 4}, "x", count=3)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_field_of_every_method_can_be_set_in_a_recipe(name):
    cls = METHODS.get(name)
    default = cls()
    assert construct(cls, {}, name) == default
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if isinstance(value, divergences.Divergence):
            instance = construct(cls, {field.name: {"reverse_kl": {"temperature": 3.0}}}, name)
            assert getattr(instance, field.name) == ReverseKL(temperature=3.0)
        else:
            plain = yaml.safe_load(yaml.safe_dump(value))
            assert getattr(construct(cls, {field.name: plain}, name), field.name) == value
        with pytest.raises(RecipeError):
            construct(cls, {field.name: {"no": ["such", "value"]}}, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_of_the_repository_can_be_built(path):
    recipe = load(path)
    assert parse(recipe.resolved()).resolved() == recipe.resolved()
    recipe.check("method", METHODS)
    recipe.build("rollout", ROLLOUTS)
    if recipe.teacher is not None:
        recipe.build("teacher", TEACHERS)
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert recipe.training.keys() <= fields


def test_an_error_names_the_line_of_the_nearest_key_that_was_given(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "student:\n  model: a\nmethod:\n  gkd:\n    divergence:\n      skew_kl: {}\ndata: {dataset: b}\n"
    )
    recipe = load(tmp_path / "r.yaml", ["training.seed=3"])
    places = {
        "method.gkd.divergence.skew_kl": "line 6",
        "method.gkd.divergence.skew_kl.alpha": "line 6",
        "method.gkd": "line 4",
        "data.max_length": "line 7",
        "training.seed": 'the override "training.seed=3"',
        "rollout": "r.yaml: x",
    }
    for key, place in places.items():
        assert place in str(recipe.error(key, "x"))


def test_an_error_is_located_once():
    recipe = parse(LEAST, "r.yaml", {("data",): "r.yaml, line 3"})
    with pytest.raises(RecipeError, match=r"^r.yaml, line 3: x$"), recipe.locating("student"), recipe.locating("data"):
        raise RecipeError("x")


def test_the_rollout_block_is_split_between_engine_and_sampling():
    recipe = parse({**LEAST, "rollout": {"generate": {"max_new_tokens": 64, "batch_size": 32, "stop_ids": [2]}}})
    assert recipe.sampling() == Sampling(max_new_tokens=64, stop_ids=(2,))
    assert recipe.build("rollout", ROLLOUTS) == GenerateRollout(batch_size=32)
    assert parse(LEAST).sampling() == Sampling()


@pytest.mark.parametrize(("field", "meant"), [("max_tokens", "max_new_tokens"), ("batchsize", "batch_size")])
def test_an_unknown_field_of_the_rollout_names_the_nearest_of_engine_and_sampling(field, meant):
    recipe = parse({**LEAST, "rollout": {"generate": {field: 64}}})
    for refuse in (recipe.build, recipe.check):
        with pytest.raises(RecipeError, match=f'rollout.generate has no field "{field}"; did you mean "{meant}"'):
            refuse("rollout", ROLLOUTS)


@pytest.mark.parametrize(
    ("fields", "sentence"), [({"top_p": 2}, "top_p in"), ({"max_new_tokens": "many"}, "max_new_tokens: .*integer")]
)
def test_sampling_out_of_range_is_refused_with_its_place(fields, sentence):
    with pytest.raises(RecipeError, match=f"rollout.generate.*{sentence}"):
        parse({**LEAST, "rollout": {"generate": fields}}).sampling()
