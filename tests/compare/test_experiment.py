"""Comparing recipes: every run in its own process, resumed at the granularity of a run, judged alike."""

import json
from pathlib import Path

import pytest
import yaml
from folders import llama
from rich.console import Console

from understudy.compare.experiment import Contestant, Trial, budget_override, compare, contestants, judge
from understudy.recipe import RecipeError, load
from understudy.report.folders import read_answers

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, a student, sums, and two recipes."""
    home = tmp_path_factory.mktemp("home")
    llama(home / "teacher", seed=1)
    llama(home / "student", seed=2)
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(12)]
    for split in ("train", "test"):
        (home / split).mkdir()
        (home / split / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, method in {"kd": {"kd": {}}, "gkd": {"gkd": {"on_policy": 1.0}}}.items():
        recipe = {
            "student": {"model": str(home / "student")},
            "teacher": {"local": {"model": str(home / "teacher")}},
            "method": method,
            "rollout": {"generate": {"max_new_tokens": 4}},
            "data": {"dataset": str(home / "train"), "max_length": 16},
            "evaluate": {"show": 0},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
        }
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.mark.slow
def test_recipes_are_run_over_seeds_and_judged_alike_and_once(home):
    output = home / "out"
    entered = [
        *contestants([home / "kd.yaml", home / "gkd.yaml"]),
        Contestant("lost", home / "kd.yaml", ("data.dataset=./nowhere.jsonl",)),
    ]
    trial = Trial(str(home / "test"), metrics=("chrf",), temperatures=(0.0, 1.0), exposure=5)
    text = compare(entered, output, trial, seeds=1, parallel=2, baseline="kd", console=QUIET)
    for name in ("kd", "gkd"):
        for seed in range(1):
            folder = output / name / f"seed-{seed}"
            assert json.loads((folder / "run.json").read_text())["seed"] == seed
            [answers] = folder.glob("answers-T=1.*.jsonl")
            assert len(answers.read_text().splitlines()) == 12
    rows = text.splitlines()
    assert "accuracy (greedy)" in rows[0]
    assert "chrf (T=1)" in rows[0]
    assert "exposure_bias (exposure)" in rows[0]
    curves = json.loads((output / "kd" / "seed-0" / "evaluation.json").read_text())["found"]["exposure"]["curves"]
    assert curves["exposure_bias"]["percent"][0] == pytest.approx(0, abs=1e-3)
    assert curves["exposure_bias"]["alive"][0] == 5
    assert [row.split(" | ")[0] for row in rows[2:7]] == [
        "| teacher",
        "| warm start",
        "| kd",
        "| gkd",
        "| lost (1 failed)",
    ]
    assert "nowhere" in text
    content = json.loads((output / "comparison.json").read_text())
    assert content["lines"][1]["against"].keys() == {"greedy", "T=1"}
    assert (output / "comparison.md").read_text() == text

    # Again: finished runs and evaluations stay; one that was lost is made again, with the same result.
    before = {p: p.stat().st_mtime_ns for p in output.rglob("evaluation.json")}
    gone = output / "gkd" / "seed-0" / "evaluation.json"
    answers = json.loads(gone.read_text())["found"]["greedy"]["scores"]
    gone.unlink()
    compare(entered[:2], output, trial, seeds=1, baseline="kd", console=QUIET)
    assert {p for p, at in before.items() if p.stat().st_mtime_ns != at} == {gone}
    assert json.loads(gone.read_text())["found"]["greedy"]["scores"] == answers


@pytest.mark.slow
def test_another_trial_leaves_files_that_no_evaluation_wrote(home, tmp_path):
    """Of a model of its own, whose answers belong to other weights when it has learned more."""
    model = llama(tmp_path / "model", seed=3)
    recipe, folder = load(home / "kd.yaml"), tmp_path / "judged"
    folder.mkdir()
    mine = {name: folder / name for name in ("answers-mine.jsonl", "answers-greedy.jsonl", "notes.txt")}
    for name, file in mine.items():
        file.write_text(f"my own {name}")
    for limit in (4, 6, 4):
        judge(str(model), recipe, folder, Trial(str(home / "test"), limit=limit))
        assert len(read_answers(folder)["greedy"]) == limit
        assert {name: file.read_text() for name, file in mine.items()} == {name: f"my own {name}" for name in mine}
    before = read_answers(folder)["greedy"]
    llama(tmp_path / "model", seed=4)
    judge(str(model), recipe, folder, Trial(str(home / "test"), limit=4))
    after = read_answers(folder)["greedy"]
    assert [line["id"] for line in after] != [line["id"] for line in before]


@pytest.mark.parametrize(
    "name",
    [
        *("comparison.json", "comparison.md", "kd/seed-0/log.txt", "kd/seed-0/failed.txt", "kd/seed-0/evaluation.json"),
        *("kd/seed-0/run.json", "kd/seed-0/checkpoint-3/state.json"),
    ],
)
def test_files_that_no_comparison_wrote_are_refused_and_stay(name, home, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"my": "own"}')
    with pytest.raises(ValueError, match=r"exists already and was not written by .*: give another --output"):
        compare(contestants([home / "kd.yaml"]), tmp_path / "out", Trial(), console=QUIET)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == '{"my": "own"}'


def test_a_sweep_makes_a_contestant_of_every_value(home):
    made = contestants([home / "kd.yaml"], ["training.max_steps=1"], "method.kd.sft_weight=0,0.5")
    assert [c.name for c in made] == ["kd sft_weight=0", "kd sft_weight=0.5"]
    assert [c.swept for c in made] == [("method.kd.sft_weight", "0"), ("method.kd.sft_weight", "0.5")]
    assert made[1].load().method == ("kd", {"sft_weight": 0.5})
    assert made[1].load().training["max_steps"] == 1


@pytest.mark.slow
def test_a_sweep_with_a_budget_says_both_and_who_left_some_of_it(home):
    """Four answers of one or two digits and their end: a step has 8 to 12 tokens, fewer than 15, and two have more."""
    from understudy.report.folders import read

    output = home / "swept"
    entered = contestants([home / "kd.yaml"], [budget_override("tokens=15")], "training.max_steps=1,9")
    text = compare(entered, output, Trial(str(home / "test")), console=QUIET, parallel=2, baseline=entered[1].name)
    assert "- Every run could spend 15 response tokens." in text
    assert "- kd max_steps=1, seed 0: max_steps ended the run with" in text
    assert "- kd max_steps=9" not in text
    content = json.loads((output / "comparison.json").read_text())
    assert content["budget"] == {"tokens": 15}
    assert content["lines"][1]["budget"] == {"tokens": 15}
    assert content["sweep"] == {
        "option": "training.max_steps",
        "points": {f"kd max_steps={n}": {"recipe": "kd", "value": n, "written": str(n)} for n in (1, 9)},
    }
    summary = json.loads((output / "kd" / "max_steps=9" / "seed-0" / "run.json").read_text())
    assert summary["budget"] == {"tokens": 15, "spent": summary["tokens"], "ended_by": "budget"}
    assert [run.name for run in read([output])] == [c.name for c in entered], "a report calls them as the comparison"

    other = contestants([home / "kd.yaml"], [budget_override("tokens=16")], "training.max_steps=1,9")
    with pytest.raises(RecipeError, match="with other settings or another budget: give another --output"):
        compare(other, output, Trial(str(home / "test")), console=QUIET)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda home: budget_override("100000"), "a budget is written tokens=N or seconds=N, such as tokens=100000"),
        (lambda home: budget_override("steps=5"), "a budget is written tokens=N"),
        (
            lambda home: compare(contestants([home / "kd.yaml"], ["budget={tokens: 0}"]), home / "no", Trial()),
            "a budget of 0 tokens cannot be spent",
        ),
        (lambda home: contestants([home / "kd.yaml"], sweep="training.learning_rate"), "a sweep is written key=value"),
        (lambda home: contestants([home / "kd.yaml", home / "kd.yaml"]), "the same file name"),
        (
            lambda home: compare(contestants([home / "kd.yaml"]), home / "no", Trial(), baseline="sft"),
            'baseline "sft"',
        ),
        (
            lambda home: compare(contestants([home / "kd.yaml"], ["method.kd.beta=1"]), home / "no", Trial()),
            'no field "beta"',
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_run(call, complaint, home):
    with pytest.raises(RecipeError, match=complaint):
        call(home)
    assert not Path(home / "no").exists()
