"""Comparing recipes: runs in processes of their own, resuming, and evaluation with the same settings."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from folders import jsonl, llama
from rich.console import Console

from understudy import cli
from understudy.compare.evaluations import evaluate_into, named_settings, read_result, with_format_of
from understudy.compare.experiment import VariantRun, compare, recording
from understudy.compare.statistics import Result
from understudy.compare.variants import Variant, budget_override, common_dataset, variants
from understudy.evaluation.settings import EvalSettings
from understudy.files import read_jsonl
from understudy.models.load import load_tokenizer
from understudy.recipe import Data, RecipeError, load
from understudy.run import marker
from understudy.run.folder import RUN, RunFolder
from understudy.terminal import explain

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
    comparison = compare(compared, output, settings, **options, seeds=(0,), parallel=2, baseline="kd", console=QUIET)
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
    compare(compared[:2], output, settings, **options, seeds=(0,), baseline="kd", console=QUIET)
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


def without_references(home):
    path = home / "prompts.jsonl"
    path.write_text('{"prompt": "1+1="}\n')
    return path


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seeds": ()}, "--seeds must be at least 1, not 0"),
        ({"parallel": 0}, "--parallel must be at least 1, not 0"),
        ({"exposure": -1}, "--exposure-bias must be at least 0, not -1"),
        ({"temperatures": [-1.0]}, "--temperature must be 0 or more, not -1"),
        ({"temperatures": [float("nan")]}, "--temperature must be 0 or more, not nan"),
        ({"temperatures": [1.0, 1.0]}, "--temperature 1 is given twice"),
        ({"temperatures": []}, "no --temperature"),
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, not 0"),
        ({"max_new_tokens": 64}, "--max-new-tokens 64 leaves no room for a prompt"),
        ({"metrics": ("nosuch",)}, 'no metric "nosuch"'),
        ({"metrics": ("self_bleu",)}, "self_bleu compares the responses to a prompt with each other"),
        ({"dataset": "./nowhere.jsonl"}, 'kd: there is no file or folder "./nowhere.jsonl"'),
        ({"split": "nosuch"}, "nosuch"),
        ({"dataset": without_references, "metrics": ("chrf",)}, "has a reference for chrf"),
        ({"set": "data.columns={completion: nosuch}"}, "nosuch"),
        ({"set": "data.dataset=./nowhere.jsonl"}, 'no file or folder "./nowhere.jsonl"'),
        ({"set": "teacher.local.model=./nowhere"}, "nowhere"),
        ({"set": "student.model=./nowhere"}, "nowhere"),
        ({"set": "method.gkd.divergence=nosuch", "recipe": "gkd"}, 'no divergence "nosuch"'),
        ({"set": "training.seed=3"}, "training.seed cannot be set in a comparison: --seeds sets it"),
        ({"set": "training.nosuch=3"}, 'no field "nosuch"'),
        ({"sweep": "training.learning_rate=1,2,1"}, 'has the value "1" twice'),
    ],
)
def test_what_would_fail_after_training_is_found_before(options, error, home, tmp_path, capsys):
    options = dict(options)
    overrides = [options.pop("set")] if "set" in options else []
    recipe = home / f"{options.pop('recipe', 'kd')}.yaml"
    block = {name: options.pop(name) for name in ("dataset", "split", "limit") if name in options}
    block["dataset"] = block.get("dataset", str(home / "test"))
    block["dataset"] = str(block["dataset"](home)) if callable(block["dataset"]) else block["dataset"]
    of_settings = {name: options.pop(name) for name in ("metrics", "max_new_tokens") if name in options}
    settings, sweep = EvalSettings(Data(**{"split": "test", **block}), **of_settings), options.pop("sweep", None)
    with pytest.raises(ValueError, match=error) as caught:
        compare(variants([recipe], overrides, sweep), tmp_path / "out", settings, **options)
    explain(caught.value)
    assert "probably a bug" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_recipe_that_is_not_finished_is_refused(home, tmp_path):
    [variant] = variants([home / "kd.yaml"])
    folder = variant.folder(tmp_path / "out", 0)
    folder.path.mkdir(parents=True)
    marker.mark(folder.path, RUN)
    folder.recipe.write_text(yaml.safe_dump(variant.recipe_in(folder, 0).resolved()))
    folder.teacher_responses.write_text("")
    other = variants([home / "kd.yaml"], ["training.max_steps=3"])
    with pytest.raises(RecipeError, match="holds an unfinished run of kd with other settings or another budget"):
        compare(other, tmp_path / "out", settings_on(home), console=QUIET)
    assert folder.teacher_responses.exists()


@pytest.mark.parametrize("value", ["runs/a/student", "..", "a b", "x" * 300, "é|[/red]\x1b", ""])
def test_every_value_of_a_sweep_has_a_folder_of_its_own_at_the_same_depth(value, home, tmp_path):
    swept = variants([home / "kd.yaml"], sweep=f"student.tokenizer=other,{value}")
    places = [variant.folder(tmp_path, 0).path.relative_to(tmp_path).parts for variant in swept]
    assert [len(parts) for parts in places] == [3, 3]
    assert len({parts[1] for parts in places}) == 2
    (tmp_path / "/".join(places[1])).mkdir(parents=True)
    assert [path.name for path in (tmp_path / "kd").iterdir()] == [places[1][1]]


def evaluated(home, folder):
    """A folder of a run with a student, evaluated, without any training."""
    llama(folder.student, seed=3)
    folder.run_json.write_text("{}")
    named = named_settings(settings_on(home))
    evaluate_into(folder, str(folder.student), named)
    return named


def test_an_evaluation_counts_until_the_model_or_the_data_change(home, tmp_path):
    folder = RunFolder(tmp_path / "run")
    data = jsonl(tmp_path / "test.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    llama(folder.student, seed=3)
    named = named_settings(EvalSettings(Data(dataset=str(data))))

    def outcome():
        return read_result(folder, str(folder.student), named)

    evaluate_into(folder, str(folder.student), named)
    assert isinstance(outcome(), Result)
    llama(folder.student, seed=4)
    assert outcome() == "model or data have changed since the evaluation"
    evaluate_into(folder, str(folder.student), named)
    assert isinstance(outcome(), Result)
    jsonl(data, [{"prompt": "2+2=", "completion": "4"}])
    assert outcome() == "model or data have changed since the evaluation"


def test_an_evaluation_of_a_run_that_is_not_finished_is_no_result(home, tmp_path):
    [variant] = variants([home / "kd.yaml"])
    folder = RunFolder(tmp_path / "run")
    run = VariantRun(variant, 0, folder, evaluated(home, folder))
    assert isinstance(run.result(), Result)
    folder.run_json.unlink()
    assert run.result() == "the process was killed"


def test_an_evaluation_that_is_damaged_is_made_again(home, tmp_path):
    folder = RunFolder(tmp_path / "run")
    named = evaluated(home, folder)
    content = folder.evaluation.read_text()
    damaged = [content[:length] for length in range(0, len(content), len(content) // 20)][:20]
    damaged += [
        content.replace('"metrics"', '"other"'),
        content.replace('"accuracy": ', '"accuracy": "x" , "": '),
        "[]",
    ]
    damaged += [content.replace('"results": {', '"results": 3, "x": {'), "\x00" * 100, "[" * 100_000]
    for text in damaged:
        folder.evaluation.write_text(text)
        assert isinstance(read_result(folder, str(folder.student), named), str)
    evaluate_into(folder, str(folder.student), named)
    assert isinstance(read_result(folder, str(folder.student), named), Result)


def test_scores_are_by_prompt_where_each_has_several_responses(home, tmp_path):
    folder = RunFolder(tmp_path / "run")
    llama(folder.student, seed=3)
    named = named_settings(settings_on(home, seeds=(1, 2, 3)), temperatures=[1.0])
    evaluate_into(folder, str(folder.student), named)
    result = read_result(folder, str(folder.student), named)
    assert isinstance(result, Result)
    scores = result.scores["T=1"]["accuracy"]
    assert len(scores) == 12
    assert sum(scores) / 12 == pytest.approx(result.metrics["T=1"]["accuracy"])


def test_the_progress_of_a_run_is_the_share_of_its_steps_in_the_log(home, tmp_path):
    run = VariantRun(Variant("kd", home / "kd.yaml"), 0, RunFolder(tmp_path), {}, max_steps=8)
    assert run.progress() == 0
    jsonl(run.folder.metrics, [{"step": 2, "loss": 1.0}, {"step": 6, "loss": 0.5}, {"step": 6, "eval_loss": 1.0}])
    assert run.progress() == 0.75
    assert replace(run, max_steps=None).progress() == 0


def test_what_a_run_writes_to_standard_error_is_in_its_log(tmp_path, capfd):
    folder = RunFolder(tmp_path / "kd")
    with recording(folder):
        print("a warning", file=sys.stderr)
    assert folder.log.read_text() == "a warning\n"
    assert capfd.readouterr().err == ""


def test_the_command_ends_with_1_where_a_run_failed(home, tmp_path, monkeypatch, capsys):
    """The processes are replaced: both runs are as if they had been killed."""
    monkeypatch.setattr("understudy.compare.experiment.run_in_processes", lambda *_: None)
    command = ["compare", home / "kd.yaml", home / "gkd.yaml", "--output", tmp_path / "out", "--data", home / "test"]
    monkeypatch.setattr("sys.argv", ["understudy", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "- kd, seed 0: the process was killed" in capsys.readouterr().out


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
