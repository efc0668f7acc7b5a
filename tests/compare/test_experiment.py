"""Comparing recipes: runs in processes of their own, resuming, and evaluation with the same settings."""

import json
from pathlib import Path

import pytest
import yaml
from folders import llama
from rich.console import Console

from understudy import cli
from understudy.compare.evaluations import evaluate_into, named_settings, read_result, with_format_of
from understudy.compare.experiment import compare
from understudy.compare.statistics import Result
from understudy.compare.variants import Variant, budget_override, common_dataset, variants
from understudy.evaluation.settings import EvalSettings
from understudy.files import read_jsonl
from understudy.models.load import load_tokenizer
from understudy.recipe import Data, RecipeError, load
from understudy.run.folder import RunFolder

QUIET = Console(quiet=True)


def settings_on(home, **options):
    """Settings for the sums of the test split, or of those in a data block."""
    return EvalSettings(Data(dataset=str(home / "test"), split="test"), **options)


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
def test_recipes_are_run_over_seeds_and_evaluated_alike_and_once(home):
    output = home / "out"
    compared = [
        *variants([home / "kd.yaml", home / "gkd.yaml"]),
        Variant("lost", home / "kd.yaml", ("training.learning_rate=1e30",)),
    ]
    settings, options = settings_on(home, metrics=("chrf",)), {"temperatures": (0.0, 1.0), "exposure": 5}
    comparison = compare(compared, output, settings, **options, seeds=1, parallel=2, baseline="kd", console=QUIET)
    assert comparison.failed == 1
    text = comparison.table
    for name in ("kd", "gkd"):
        for seed in range(1):
            folder = output / name / f"seed-{seed}"
            assert json.loads((folder / "run.json").read_text())["seed"] == seed
            [responses] = folder.glob("responses-T=1.*.jsonl")
            assert len(responses.read_text().splitlines()) == 12
    rows = text.splitlines()
    assert "accuracy (greedy)" in rows[0]
    assert "chrf (T=1)" in rows[0]
    assert "exposure_bias (exposure)" in rows[0]
    curves = json.loads((output / "kd" / "seed-0" / "evaluation.json").read_text())["results"]["exposure"]["curves"]
    assert curves["exposure_bias"]["percent"][0] == pytest.approx(0, abs=1e-3)
    assert curves["exposure_bias"]["alive"][0] == 5
    assert [row.split(" | ")[0] for row in rows[2:7]] == [
        "| teacher",
        "| warm start",
        "| kd",
        "| gkd",
        "| lost (1 failed)",
    ]
    assert "learning_rate" in text
    content = json.loads((output / "comparison.json").read_text())
    assert content["rows"][1]["difference"].keys() == {"greedy", "T=1"}
    assert (output / "comparison.md").read_text() == text

    # Again: finished runs and evaluations stay; one that was lost is computed again, with the same result.
    before = {p: p.stat().st_mtime_ns for p in output.rglob("evaluation.json")}
    lost = output / "gkd" / "seed-0" / "evaluation.json"
    scores = json.loads(lost.read_text())["results"]["greedy"]["scores"]
    lost.unlink()
    compare(compared[:2], output, settings, **options, seeds=1, baseline="kd", console=QUIET)
    assert {p for p, mtime in before.items() if p.stat().st_mtime_ns != mtime} == {lost}
    assert json.loads(lost.read_text())["results"]["greedy"]["scores"] == scores


@pytest.mark.slow
def test_other_settings_leave_files_that_no_evaluation_wrote(home, tmp_path):
    """With a model whose weights change in between, so that its responses differ."""
    model = llama(tmp_path / "model", seed=3)
    folder = tmp_path / "evaluated"
    folder.mkdir()
    mine = {name: folder / name for name in ("responses-mine.jsonl", "responses-greedy.jsonl", "notes.txt")}
    for name, file in mine.items():
        file.write_text(f"my own {name}")

    def responses(limit):
        data = Data(dataset=str(home / "test"), split="test", limit=limit)
        evaluate_into(RunFolder(folder), str(model), named_settings(EvalSettings(data)))
        return RunFolder(folder).read_responses()["greedy"]

    for limit in (4, 6, 4):
        assert len(responses(limit)) == limit
        assert {name: file.read_text() for name, file in mine.items()} == {name: f"my own {name}" for name in mine}
    before = responses(4)
    llama(tmp_path / "model", seed=4)
    after = responses(4)
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
        compare(variants([home / "kd.yaml"]), tmp_path / "out", settings_on(home), console=QUIET)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == '{"my": "own"}'


def test_a_sweep_gives_a_variant_for_every_value(home):
    swept = variants([home / "kd.yaml"], ["training.max_steps=1"], "method.kd.sft_weight=0,0.5")
    assert [c.name for c in swept] == ["kd sft_weight=0", "kd sft_weight=0.5"]
    assert [c.swept for c in swept] == [("method.kd.sft_weight", "0"), ("method.kd.sft_weight", "0.5")]
    assert swept[1].load().method == ("kd", {"sft_weight": 0.5})
    assert swept[1].load().training["max_steps"] == 1


@pytest.mark.slow
def test_a_sweep_with_a_budget_reports_both_and_runs_that_ended_before_it(home):
    """Four responses of one or two digits and their end: a step has 8 to 12 tokens, below 15, and two have more."""
    from understudy.report.folders import read_runs

    output = home / "swept"
    compared = variants([home / "kd.yaml"], [budget_override("tokens=15")], "training.max_steps=1,9")
    text = compare(compared, output, settings_on(home), console=QUIET, parallel=2, baseline=compared[1].name).table
    assert "- Every run could spend 15 response tokens." in text
    assert "- kd max_steps=1, seed 0: max_steps ended the run with" in text
    assert "- kd max_steps=9" not in text
    content = json.loads((output / "comparison.json").read_text())
    assert content["budget"] == {"tokens": 15}
    assert content["rows"][1]["budget"] == {"tokens": 15}
    assert content["sweep"] == {
        "option": "training.max_steps",
        "points": {f"kd max_steps={n}": {"recipe": "kd", "value": n, "written": str(n)} for n in (1, 9)},
    }
    summary = json.loads((output / "kd" / "max_steps=9" / "seed-0" / "run.json").read_text())
    assert summary["budget"] == {"tokens": 15, "spent": summary["tokens"], "ended_by": "budget"}
    assert [run.name for run in read_runs([output])] == [c.name for c in compared], "a report has the same names"

    other = variants([home / "kd.yaml"], [budget_override("tokens=16")], "training.max_steps=1,9")
    with pytest.raises(RecipeError, match="with other settings or another budget: give another --output"):
        compare(other, output, settings_on(home), console=QUIET)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda home: budget_override("100000"), "a budget is written tokens=N or seconds=N, such as tokens=100000"),
        (lambda home: budget_override("steps=5"), "a budget is written tokens=N"),
        (
            lambda home: compare(variants([home / "kd.yaml"], ["budget={tokens: 0}"]), home / "no", settings_on(home)),
            "a budget of 0 tokens cannot be spent",
        ),
        (lambda home: variants([home / "kd.yaml"], sweep="training.learning_rate"), "a sweep is written key=value"),
        (lambda home: variants([home / "kd.yaml", home / "kd.yaml"]), "the same file name"),
        (
            lambda home: compare(variants([home / "kd.yaml"]), home / "no", settings_on(home), baseline="sft"),
            'no recipe "sft" for the baseline',
        ),
        (
            lambda home: compare(variants([home / "kd.yaml"], ["method.kd.beta=1"]), home / "no", settings_on(home)),
            'no field "beta"',
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_run(call, error, home):
    with pytest.raises(RecipeError, match=error):
        call(home)
    assert not Path(home / "no").exists()


def test_recipes_with_different_datasets_need_a_dataset_to_be_evaluated_on(home):
    other = Variant("other", home / "kd.yaml", ("data.dataset=elsewhere",))
    assert common_dataset(variants([home / "kd.yaml", home / "gkd.yaml"])) == str(home / "train")
    with pytest.raises(RecipeError, match="different datasets: name the one on which all students are evaluated"):
        common_dataset([*variants([home / "kd.yaml"]), other])


def test_a_row_is_read_in_each_recipe_s_own_way_and_nothing_else_is_the_recipe_s(home):
    """The problems of the playground, above all, are not those of the seed that the recipe trains on."""
    changes = ["data.template='{prompt} '", "data.seed=2", "data.limit=3", "data.max_length=12"]
    named = with_format_of(named_settings(settings_on(home)), load(home / "kd.yaml", changes))
    data = named["greedy"].data
    assert data.template == "{prompt} "
    assert (data.dataset, data.split, data.seed, data.limit) == (str(home / "test"), "test", 0, None)


def test_the_evaluation_of_a_student_is_the_same_by_every_command(home, tmp_path, monkeypatch):
    """`evaluate`, `compare` and the demo: the same problems, lengths, dtype and device, so the same responses."""
    student = tmp_path / "run" / "student"
    tokenizer = load_tokenizer("playground:arithmetic")
    llama(student, seed=3, tokenizer=tokenizer, vocab_size=len(tokenizer), torch_dtype="bfloat16")
    output = tmp_path / "responses.jsonl"
    command = ["evaluate", student, "--data", "playground:arithmetic", "--limit", 50, "--output", output]
    monkeypatch.setattr("sys.argv", ["understudy", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0

    changed = load(home / "kd.yaml", ["data.seed=2", "data.limit=90", "rollout.generate.max_new_tokens=5"])
    block = Data(dataset="playground:arithmetic", split="test", limit=50)
    settings = with_format_of(named_settings(EvalSettings(block)), changed)
    folder = RunFolder(tmp_path / "run")
    evaluate_into(folder, str(student), settings)
    result = read_result(folder, str(student), settings)
    assert isinstance(result, Result)

    by_command, by_comparison = read_jsonl(output), folder.read_responses()["greedy"]
    assert sorted(by_command, key=lambda line: line["row"]) == by_comparison
    assert len(by_comparison) == 50
    metrics = json.loads((tmp_path / "responses.metrics.json").read_text())["metrics"]
    for name in ("accuracy", "response_length", "truncated"):
        assert metrics[name] == result.metrics["greedy"][name]
