"""The report: it shows what the runs' folders hold, and the page is safe, self-contained and readable by itself."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from browser import chromium
from folders import characters, described, llama, sums, write

from understudy import report
from understudy.batch import Example
from understudy.compare.statistics import Spread
from understudy.recipe import load
from understudy.report.curves import distance
from understudy.report.folders import read_runs
from understudy.report.responses import disagreement

HOSTILE = (
    '</script><script>window.hacked = 1</script><img src="http://127.0.0.1:9/x" onerror="hacked = 1">$x^2_{$ &amp; "\''
)


def logged(step, **values):
    line = {"step": step, "loss": 3 / step, "reverse_kl": 2 / step, "forward_kl": 1 / step, "grad_norm": 1.0}
    line |= {"seconds_generate": 2.0, "seconds_score": 1.0, "seconds_learn": 4.0, "seconds_other": 0.5, "tokens": 100.0}
    return {**line, "response_length": 10.0, "truncated": 0.25, "tokens_per_second": 13.3, "epoch": 0.1, **values}


def make_run(folder, method="gkd", seed=0, steps=(10, 20, 30), finished=True, lines=None, **summary):
    """A run's folder as `distill` leaves it, without models."""
    folder.mkdir(parents=True)
    recipe = {
        "student": {"model": "nowhere/start"},
        "teacher": {"local": {"model": "nowhere/teacher"}},
        "method": {method: {}},
        "data": {"dataset": "nowhere.jsonl", "split": "train"},
        "training": {"max_steps": 30, "seed": seed},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    logged_lines = [logged(step) for step in steps] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged_lines))
    (folder / "before.json").write_text(json.dumps({"fingerprint": "f00", "student_samples": {"reverse_kl": 0.75}}))
    if finished:
        content = {
            "steps": 30,
            "seconds": 22.5,
            "cpu_seconds": 20.0,
            "tokens": 4321,
            "seed": seed,
            "fingerprint": "f00dfeed",
            "peak_memory_mb": 512.0,
            "versions": {"torch": "2.13.0", "commit": "c0ffee"},
            "metrics": {"eval_loss": 0.125},
            "student_samples": {"before": {"reverse_kl": 0.75}, "after": {"reverse_kl": 0.25}},
        }
        (folder / "run.json").write_text(json.dumps({**content, **summary}))
    return folder


def evaluate(folder, scores, limit=None, texts=None, bias=None):
    """Write the evaluation of a comparison into a run's folder."""
    folder = getattr(folder, "path", folder)
    settings = {"greedy": {"data": {"dataset": "sums", "limit": limit}, "temperature": 0.0, "metrics": []}}
    metrics = {"accuracy": sum(scores) / len(scores), "response_length": 9.0, "truncated": 0.0}
    greedy = {"metrics": metrics, "scores": {"accuracy": scores}, "responses": "responses-greedy.0123abcd.jsonl"}
    evaluation = {"settings": settings, "results": {"greedy": greedy}}
    if bias is not None:
        curve = {"percent": [None, bias], "standard_error": [None, 1.0]}
        other = {"metrics": {"exposure_bias": bias}, "scores": {}, "curves": {"exposure_bias": curve}}
        evaluation["results"]["exposure"] = other
        (folder / "responses-exposure.0123abcd.teacher.jsonl").write_text("{}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    pairs = texts or [(f"What is {i}?", f"{i}") for i in range(len(scores))]
    lines = [
        {"prompt": p, "response": r, "references": ["1"], "correct": bool(s)}
        for (p, r), s in zip(pairs, scores, strict=True)
    ]
    (folder / "responses-greedy.0123abcd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def contest(tmp_path):
    """Two recipes over two seeds, one of which failed, as `understudy compare` leaves them."""
    from understudy.compare.evaluations import reference_folder

    home = tmp_path / "contest"
    for name, seed, right in (("gkd", 0, 9), ("gkd", 1, 7), ("kd", 0, 2)):
        evaluate(make_run(home / name / f"seed-{seed}", name, seed), [1.0] * right + [0.0] * (10 - right), bias=5.5)
    (home / "kd" / "seed-1").mkdir()
    (home / "kd" / "seed-1" / "failed.txt").write_text("out of luck")
    evaluate(reference_folder(home, "nowhere/teacher"), [1.0] * 10)
    evaluate(reference_folder(home, "nowhere/start"), [0.0] * 10)
    return home


def write_report(place, output, **options):
    page, ended = report.write_report([place] if isinstance(place, Path) else place, output, models=False, **options)
    return page, ended, json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("name", ["report.html", "report.json", "png/mine.png"])
def test_files_that_no_report_wrote_are_refused_and_stay(name, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="exists already and was not written by a report: give another --output"):
        write_report(make_run(tmp_path / "run"), tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_a_finished_run_is_shown_with_its_numbers(tmp_path):
    page, ended, content = write_report(make_run(tmp_path / "run"), tmp_path / "out")
    [run] = content["runs"]
    assert ended
    assert run["seconds_by_activity"] == {"generate": 6.0, "score": 3.0, "learn": 12.0, "other": 1.5}
    assert run["series"]["loss"] == {
        "step": [10, 20, 30],
        "seconds": [7.5, 15.0, 22.5],
        "tokens": [100.0, 200.0, 300.0],
        "value": [0.3, 0.15, 0.1],
    }
    assert (run["tokens"], run["peak_memory_mb"], run["state"]) == (4321, 512.0, "finished")
    assert content["summary"] == (
        "gkd trained for 30 steps, 4,321 response tokens and 22 s: the reverse KL to the teacher on student samples "
        "fell from 0.75 to 0.25 nats per token."
    )
    html = page.read_text()
    for text in ("f00dfeed", "c0ffee", "4,321", "512", "0.2500", content["summary"]):
        assert text in html
    pictures = {path.stem for path in (tmp_path / "out" / "png").iterdir()}
    assert pictures == {"curves", "time"}


def test_a_run_in_progress_is_shown_up_to_its_last_step(tmp_path):
    folder = make_run(tmp_path / "run", finished=False, steps=(10, 20))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    page, ended, content = write_report(folder, tmp_path / "out", again=10)
    assert not ended
    assert "trained for 20 of 30 steps, 200 response tokens and 15 s so far" in content["summary"]
    assert content["runs"][0]["series"]["loss"]["step"] == [10, 20]
    assert '<meta http-equiv="refresh" content="10">' in page.read_text()


def test_a_run_that_has_logged_nothing_yet_has_a_page(tmp_path):
    _, _, content = write_report(make_run(tmp_path / "run", finished=False, steps=()), tmp_path / "out")
    assert "nothing was logged yet" in content["summary"]


def test_nan_and_infinity_are_left_out_of_charts_and_file(tmp_path):
    lines = [logged(10, loss=float("nan")), logged(20, loss=float("inf")), logged(30, reward=1)]
    _, _, content = write_report(make_run(tmp_path / "run", lines=lines), tmp_path / "out")
    assert content["runs"][0]["series"]["loss"]["value"] == [None, None, 0.1]


def test_watching_ends_with_the_run(tmp_path, monkeypatch):
    folder, pages = make_run(tmp_path / "run", finished=False), []

    def finish(seconds):
        assert seconds >= report.REFRESH
        (folder / "run.json").write_text(json.dumps({"steps": 30, "seconds": 1.0, "tokens": 1}))

    monkeypatch.setattr(report.time, "sleep", finish)
    page = report.watch([folder], tmp_path / "out", models=False, on_write=lambda path: pages.append(path.read_text()))
    assert ["refresh" in html for html in pages] == [True, False]
    assert "refresh" not in page.read_text()


def test_a_comparison_is_the_table_that_compare_computes(contest, tmp_path):
    _, ended, content = write_report(contest, tmp_path / "out")
    comparison = content["comparison"]
    rows = {row["name"]: row for row in comparison["rows"]}
    expected = Spread.of([0.9, 0.7])
    assert rows["gkd"]["metrics"]["greedy"]["accuracy"] == {
        "mean": expected.mean,
        "deviation": expected.deviation,
        "low": expected.low,
        "high": expected.high,
    }
    assert rows["kd"]["failed"] == ["seed 1: out of luck"]
    assert rows["kd"]["gap_closed"]["greedy"]["accuracy"] == pytest.approx(0.2)
    assert comparison["references"]["teacher"]["metrics"]["greedy"]["accuracy"] == 1.0
    assert comparison["columns"][-1] == ["exposure", "exposure_bias"]
    assert rows["gkd"]["metrics"]["exposure"]["exposure_bias"]["mean"] == 5.5
    assert (tmp_path / "out" / "png" / "exposure-bias.png").is_file()
    assert comparison["ranking"]["names"] == ["gkd", "kd"]
    assert comparison["ranking"]["difference"]["mean"] == pytest.approx(0.7)  # over the seed that both have
    assert ended
    assert content["summary"].startswith("gkd is first of 2 in accuracy (greedy) with 80.0 %")
    assert (
        "over 2 seeds (teacher 100.0 %, warm start 0.0 %), before kd with 20.0 %; with one seed, what another seed "
        "would change is unknown" in content["summary"]
    )
    assert content["summary"].endswith("(1 failed of 4 runs).")
    by = [response["by"] for response in content["responses"]["prompts"][0]["responses"]]
    assert by == ["teacher", "warm start", "gkd", "kd"]


def test_runs_that_all_failed_say_why(contest, tmp_path):
    for place in (contest / "gkd" / "seed-0", contest / "gkd" / "seed-1", contest / "kd" / "seed-0"):
        (place / "failed.txt").write_text("no memory")
    page, _, content = write_report(contest, tmp_path / "out")
    assert content["comparison"] is None
    assert content["summary"].endswith("(4 failed of 4 runs).")
    assert "failed: no memory" in page.read_text()


def test_results_of_other_settings_are_not_compared(contest, tmp_path):
    evaluate(contest / "kd" / "seed-0", [1.0] * 10, limit=3)
    _, _, content = write_report(contest, tmp_path / "out")
    kd = next(row for row in content["comparison"]["rows"] if row["name"] == "kd")
    assert kd["seeds"] == 0
    assert "seed 0: evaluated with other settings" in kd["failed"]


def test_runs_of_several_places_are_named_by_their_folders(tmp_path):
    places = [make_run(tmp_path / "a" / "run", "kd"), make_run(tmp_path / "b" / "run", "sft")]
    assert [run.name for run in read_runs(places)] == ["a run", "b run"]
    _, _, content = write_report(places, tmp_path / "out")
    assert content["summary"].startswith("Of 2 runs, a run is nearest to the teacher on student samples")


def test_exposure_bias_and_distances_are_drawn_over_positions(tmp_path):
    folder = make_run(tmp_path / "run")
    bias = {"percent": [None, 40.0, 5.0, 12.5], "standard_error": [None, 4, 1, 2], "alive": [4.0, 4.0, 4.0, 2.0]}
    distance = {"alive": [4.0, 2.0], "forward_kl": [0.5, 1.0], "reverse_kl": [0.25, 2.0]}
    measured = {"metrics": {"exposure_bias": 12.5}, "curves": {"exposure_bias": bias, "distance": distance}}
    (folder / "responses.metrics.json").write_text(json.dumps(measured))
    page, _, content = write_report(folder, tmp_path / "out")
    assert content["runs"][0]["positions"]["exposure_bias"] == bias
    assert "Exposure bias of run: 12.5 % over 4 positions, at most 40 % at position 2." in page.read_text()
    assert content["distance"] == {"run": {"reverse_kl": [0.25, 2.0], "forward_kl": [0.5, 1.0]}}
    assert {"exposure-bias.png", "distance.png"} <= {path.name for path in (tmp_path / "out" / "png").iterdir()}


def test_distances_of_several_seeds_are_means_over_their_tokens():
    """A position counts for as many tokens as there are; it is left out where almost no response is so long."""

    def run(alive, values):
        curves = {"alive": alive, "forward_kl": values, "reverse_kl": [2 * v for v in values]}
        return {"name": "kd", "positions": {"distance": curves}}

    runs = [run([30.0, 10.0, 1.0], [1.0, 2.0, 99.0]), run([10.0, 30.0], [5.0, 6.0])]
    assert distance(runs) == {"kd": {"reverse_kl": [4.0, 10.0], "forward_kl": [2.0, 5.0]}}


def swept(home, values, recipes=("kd",), option="training.learning_rate", seeds=2, baseline=None):
    """What `understudy compare --sweep` leaves; the n-th value of a recipe is right n times of ten, plus the seed."""
    from understudy.compare.evaluations import reference_folder
    from understudy.recipe.yaml_text import value_of

    points, short = {}, option.rpartition(".")[2]
    for recipe in recipes:
        for index, value in enumerate(values):
            points[f"{recipe} {short}={value}"] = {"recipe": recipe, "value": value_of(value), "written": value}
            for seed in range(seeds):
                folder = make_run(home / recipe / f"{short}={value}" / f"seed-{seed}", recipe, seed)
                evaluate(folder, [1.0] * (index + seed + 1) + [0.0] * (9 - index - seed), bias=float(index))
    for model, right in (("teacher", 10), ("start", 1)):
        evaluate(reference_folder(home, f"nowhere/{model}"), [1.0] * right + [0.0] * (10 - right))
    record = {"baseline": baseline, "sweep": {"option": option, "points": points}}
    (home / "comparison.json").write_text(json.dumps(record))
    return home


def drawings(page):
    """The title and the description of every picture of a page."""
    parts = Elements(page.read_text())
    ids = [dict(attrs)["aria-labelledby"].split() for tag, attrs in parts.elements if tag == "svg"]
    assert all(len(pair) == 2 for pair in ids)
    html = page.read_text()
    return [
        (html.split(f'<title id="{title}">')[1].split("<")[0], html.split(f'<desc id="{about}">')[1].split("<")[0])
        for title, about in ids
    ]


def test_a_sweep_is_a_curve_with_its_intervals_and_the_references(tmp_path):
    """Two seeds with 1 and 2, 2 and 3, 3 and 4 right answers of ten: whiskers go from one to the other."""
    home = swept(tmp_path / "home", ["1e-2", "1e-4", "1e-3"], baseline="kd learning_rate=1e-4")
    page, _, content = write_report(home, tmp_path / "out")
    sweep = content["comparison"]["sweep"]
    assert (sweep["option"], sweep["axis"]) == ("training.learning_rate", "log")
    assert [(p["value"], p["written"]) for p in sweep["recipes"]["kd"]] == [
        (1e-4, "1e-4"),
        (1e-3, "1e-3"),
        (1e-2, "1e-2"),
    ]
    description = dict(drawings(page))["Accuracy (greedy) over learning_rate"]
    assert description.startswith(
        "Over training.learning_rate. kd: 25.0 % (20.0 % to 30.0 %) at 1e-4, 35.0 % (30.0 % to 40.0 %) at 1e-3, "
        "15.0 % (10.0 % to 20.0 %) at 1e-2; "
    )
    assert description.endswith("; teacher 100.0 %; warm start 10.0 %; baseline 25.0 %.")
    three = write_report(swept(tmp_path / "three", ["0", "1"], seeds=3), tmp_path / "more")[0]
    spread = Spread.of([0.1, 0.2, 0.3])
    description = dict(drawings(three))["Accuracy (greedy) over learning_rate"]
    assert f"kd: 20.0 % ({100 * spread.low:.1f} % to {100 * spread.high:.1f} %) at 0, " in description
    pictures = {path.stem for path in (tmp_path / "out" / "png").iterdir()}
    assert {"sweep-greedy-accuracy", "sweep-exposure-exposure_bias"} <= pictures
    assert "sweep-greedy-response_length" not in pictures, "it is the same everywhere"
    assert "quality-greedy-accuracy" not in pictures, "the curve shows what bars would"


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        (["0.5", "0", "1"], "linear"),
        (["1", "30"], "linear"),
        (["1", "31"], "log"),
        (["1e-4", "-1"], "linear"),
        (["forward_kl", "reverse_kl"], "words"),
        (["true", "false"], "words"),
        (["null", "5"], "words"),
    ],
)
def test_the_axis_of_a_sweep_follows_its_values(values, axis, tmp_path):
    page, _, content = write_report(swept(tmp_path / "home", values, option="a.b", seeds=1), tmp_path / "out")
    sweep = content["comparison"]["sweep"]
    assert sweep["axis"] == axis
    order = [point["written"] for point in sweep["recipes"]["kd"]]
    assert order == (values if axis == "words" else sorted(values, key=float))
    svg = page.read_text().split("<svg")[1]
    assert all(f">{value}</text>" in svg for value in values), "every value stands below the axis"


@pytest.mark.parametrize(("recipes", "panels"), [(("kd", "gkd", "sft"), 1), (("kd", "gkd", "sft", "dpkd"), 4)])
def test_recipes_of_a_sweep_share_a_panel_as_long_as_they_can_be_told_apart(recipes, panels, tmp_path):
    page, _, content = write_report(swept(tmp_path / "home", ["0", "1"], recipes, seeds=1), tmp_path / "out")
    assert list(content["comparison"]["sweep"]["recipes"]) == list(recipes)
    about = [
        description
        for _, description in drawings(page)
        if description.startswith("Over training.learning_rate. ") and "%" in description
    ]
    assert len(about) == panels
    for recipe in recipes:
        assert sum(f" {recipe}: 10.0 % at 0, 20.0 % at 1" in description for description in about) == 1


def test_a_sweep_of_which_some_failed_is_drawn_without_them(tmp_path):
    home = swept(tmp_path / "home", ["0", "1", "2"], seeds=1)
    for value in (0, 1):
        (home / "kd" / f"learning_rate={value}" / "seed-0" / "failed.txt").write_text("no memory")
    page, _, _ = write_report(home, tmp_path / "out")
    assert "kd: 30.0 % at 2" in dict(drawings(page))["Accuracy (greedy) over learning_rate"]


def test_exposure_bias_is_a_curve_for_every_variant_with_its_band_over_seeds(tmp_path):
    """As far as the responses of all seeds reach; of a single seed the band is the standard error over prompts."""
    curves = {
        ("gkd", 0): {"percent": [None, 1.0, 5.0, 9.0], "standard_error": [None, 1.0, 1.0, 1.0]},
        ("gkd", 1): {"percent": [None, 2.0, 6.0], "standard_error": [None, 1.0, 1.0]},
        ("gkd", 2): {"percent": [None, 3.0, 10.0, 9.0], "standard_error": [None, 1.0, 1.0, 1.0]},
        ("kd", 0): {"percent": [None, 4.0, 8.0], "standard_error": [None, 0.5, 2.0]},
        ("sft", 0): {"percent": [None, 4.0, 8.0], "standard_error": [None, 0.5, 2.0]},
        ("sft", 1): {"percent": [None, 1.0, 9.0], "standard_error": [None, 0.5, 2.0]},
    }
    for (name, seed), curve in curves.items():
        folder = make_run(tmp_path / "home" / name / f"seed-{seed}", name, seed)
        (folder / "a.metrics.json").write_text(json.dumps({"metrics": {}, "curves": {"exposure_bias": curve}}))
    page, _, content = write_report(tmp_path / "home", tmp_path / "out")
    gkd, kd = content["exposure_bias"]["gkd"], content["exposure_bias"]["kd"]
    spread = Spread.of([5.0, 6.0, 10.0])
    assert (gkd["seeds"], gkd["mean"]) == (3, [None, 2.0, spread.mean])
    assert (gkd["low"][2], gkd["high"][2]) == (spread.low, spread.high)
    assert (kd["seeds"], kd["low"], kd["high"]) == (1, [None, 3.5, 6.0], [None, 4.5, 10.0])
    sft = content["exposure_bias"]["sft"]
    assert (sft["mean"], sft["low"], sft["high"]) == ([None, 2.5, 8.5], [None, 1.0, 8.0], [None, 4.0, 9.0])
    descriptions = dict(drawings(page))
    assert descriptions["gkd"] == (
        f"Exposure bias of gkd: 7.0 % over 3 positions, mean of 3 seeds, "
        f"95 % interval over seeds: {spread.low:.1f} to {spread.high:.1f} %; others in grey."
    )
    assert descriptions["kd"] == "Exposure bias of kd: 8.0 % over 3 positions; others in grey."


def test_a_budget_is_stated_below_the_table(contest, tmp_path):
    for path in contest.glob("*/seed-*/run.json"):
        summary = json.loads(path.read_text())
        record = {"tokens": 5000, "spent": summary["tokens"], "ended_by": "max_steps"}
        path.write_text(json.dumps({**summary, "budget": record}))
    page, _, content = write_report(contest, tmp_path / "out")
    expected = "kd, seed 0: max_steps ended the run with 4,321 of 5,000 response tokens spent."
    assert "Every run could spend 5,000 response tokens." in content["comparison"]["notes"]
    assert content["comparison"]["notes"][-1] == expected
    assert all(note in page.read_text() for note in content["comparison"]["notes"])


def test_held_out_metrics_are_drawn_against_the_seconds_of_training(tmp_path):
    lines = [logged(10), {"step": 10, "eval_loss": 2.0}, logged(20), {"step": 20, "eval_loss": 1.0}]
    _, _, content = write_report(make_run(tmp_path / "run", lines=lines), tmp_path / "out")
    assert content["runs"][0]["series"]["eval_loss"]["seconds"] == [7.5, 15.0]
    assert (tmp_path / "out" / "png" / "quality-time.png").is_file()


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("missing", "there is no folder .*nowhere: name a run's folder"),
        ("empty", "empty is not a run's folder and contains none"),
        ("broken", r"run\.json cannot be read: it is not a file that a run writes"),
    ],
)
def test_mistakes_are_a_sentence(case, sentence, tmp_path):
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "broken") / "run.json").write_text("{")
    place = tmp_path / {"missing": "nowhere"}.get(case, case)
    with pytest.raises(ValueError, match=sentence):
        report.write_report([place], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finding_runs_loads_nothing_heavy():
    code = "import sys, understudy.report.folders; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Elements(HTMLParser):
    """Every element's name and attributes, and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_charts_have_descriptions_and_the_colours_of_the_page(contest, tmp_path):
    page, _, _ = write_report(contest, tmp_path / "out")
    html = page.read_text()
    elements = Elements(html).elements
    pictures = [attrs for tag, attrs in elements if tag == "svg"]
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(pictures) > 5
    assert len(ids) == len(set(ids))
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert all(name in ids for name in attrs["aria-labelledby"].split())
    for svg in html.split("<svg")[1:]:
        drawing = svg[: svg.index("</svg>")]
        assert "var(--accent)" in drawing or "var(--soft)" in drawing
        assert "#" not in drawing.replace("url(#", "").replace('href="#', "")  # no colour of its own
        for inside in ("url(#", 'href="#'):
            assert all(part.split('"')[0].split(")")[0] in ids for part in drawing.split(inside)[1:])


def test_the_spaces_and_joiners_of_other_scripts_are_kept(tmp_path):
    text = "10\u00a0%\u3000\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c"
    lines = {"step": 10, "prompt": text, "student": text + "\u202e", "reference": None}
    (make_run(tmp_path / "run") / "samples.jsonl").write_text(json.dumps(lines) + "\n")
    page, _, _ = write_report(tmp_path / "run", tmp_path / "out")
    html = page.read_text()
    assert f">{text}</pre>" in html
    assert f">{text}\N{REPLACEMENT CHARACTER}</pre>" in html


def test_a_dollar_sign_in_a_name_is_not_parsed_as_mathematics(tmp_path):
    page, _, _ = write_report([make_run(tmp_path / "a$x_{$"), make_run(tmp_path / "b")], tmp_path / "out")
    assert "a$x_{$" in page.read_text()


# With models


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    llama(home / "teacher", seed=1)
    sums(home / "sums.jsonl")
    return home


@pytest.fixture(scope="module")
def trained(home):
    """A real run of two steps."""
    from rich.console import Console

    from understudy.run.distill import distill

    look = {"dataset": str(home / "sums.jsonl"), "limit": 4, "show": 1}
    recipe = load(write(home / "recipe.yaml", described(home, evaluate=look)))
    distill(recipe, console=Console(quiet=True))
    return home / "run"


def test_models_respond_to_the_same_prompts_and_the_teacher_scores_the_responses(trained, tmp_path):
    report.write_report([trained], tmp_path, prompts=2)
    responses = json.loads((tmp_path / "report.json").read_text())["responses"]
    assert "the first held-out prompts" in responses["about"]
    by = [[response["by"] for response in prompt["responses"]] for prompt in responses["prompts"]]
    assert by == [["teacher", "run"]] * 2
    for prompt in responses["prompts"]:
        teachers, students = prompt["responses"]
        assert "tokens" not in teachers
        pieces = [token["text"] for token in students["tokens"]]
        assert "".join(piece for piece in pieces if not piece.startswith("<")) == students["text"]


def test_disagreement_is_computed_from_the_models_logits(home, tmp_path):
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "student", seed=2, hidden_size=8)).eval()
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    tokenizer = characters()
    prompt, response = tokenizer.encode("1+2="), tokenizer.encode("#### 3")
    tokens = disagreement(student, teacher, Example(prompt, response), tokenizer)
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        p, q = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (teacher, student))
    rows = range(len(response))
    assert [token["text"] for token in tokens] == list("#### 3")
    for name, expected in {
        "student": q[rows, response],
        "teacher": p[rows, response],
        "forward_kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "likeliest_p": p.exp().max(-1).values,
    }.items():
        assert [token[name] for token in tokens] == pytest.approx(expected.tolist(), abs=2e-5), name
    assert [token["agrees"] for token in tokens] == (p.argmax(-1) == torch.tensor(response)).tolist()


def test_a_character_of_several_tokens_is_one_piece_with_their_sum(home, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    tokenizer = characters()

    class Bytes:
        """Reads "ab" as one character that needs both tokens."""

        def get_vocab(self):
            return tokenizer.get_vocab()

        def decode(self, ids, **_):
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            return (
                text.replace("ab", "é")[:-1] + "\N{REPLACEMENT CHARACTER}"
                if text[-1:] == "a"
                else text.replace("ab", "é")
            )

    example = Example(tokenizer.encode("1="), tokenizer.encode("cabd"))
    by_token = disagreement(model, model, example, tokenizer)
    merged = disagreement(model, model, example, Bytes())
    assert [token["text"] for token in merged] == ["c", "é", "d"]
    assert merged[1]["student"] == pytest.approx(by_token[1]["student"] + by_token[2]["student"])
    assert sum(t["teacher"] for t in merged) == pytest.approx(sum(t["teacher"] for t in by_token))


def test_without_models_a_report_says_so_and_shows_saved_responses(trained, tmp_path, home):
    report.write_report([trained], tmp_path, models=False)
    responses = json.loads((tmp_path / "report.json").read_text())["responses"]
    assert "No models were loaded (--no-models was given)" in responses["about"]
    assert [response["by"] for response in responses["prompts"][0]["responses"]] == ["run, step 2"]
    (home / "teacher").rename(home / "away")
    try:
        report.write_report([trained], tmp_path)
    finally:
        (home / "away").rename(home / "teacher")
    responses = json.loads((tmp_path / "report.json").read_text())["responses"]
    assert f'no model can be loaded from "{home / "teacher"}"' in responses["about"]


# In a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as instance:
        yield instance


@pytest.fixture
def opened(contest, tmp_path, browser):
    page, _, _ = write_report(contest, tmp_path / "out")
    browser.look(1280)
    browser.console(), browser.requests()
    browser.open(page)
    return browser


def test_the_page_has_no_errors_and_requests_nothing(opened):
    assert opened.console() == []
    assert [url for url in opened.requests() if not url.startswith("data:")] == [opened.run("return location.href")]


@pytest.mark.usefixtures("opened")
def test_tables_sort_by_number_and_by_name(opened):
    column = "const table = document.querySelector('table'); const at = arguments[0];"
    names = column + "return [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim())"
    click = column + "table.tHead.rows[0].cells[at].querySelector('button').click();"
    click += "return table.tHead.rows[0].cells[at].getAttribute('aria-sort')"
    assert opened.run(click, 1) == "descending"
    assert opened.run(names, 1) == ["teacher", "gkd", "kd", "warm start"]
    assert opened.run(click, 1) == "ascending"
    assert opened.run(names, 1) == ["warm start", "kd", "gkd", "teacher"]
    assert opened.run(click, 0) == "ascending"
    assert opened.run(names, 0) == ["gkd", "kd", "teacher", "warm start"]


def test_the_page_is_no_wider_than_a_phone_and_goes_dark(opened):
    colours = "const page = getComputedStyle(document.body), text = document.querySelector('svg text');"
    colours += "return [page.backgroundColor, page.color, getComputedStyle(text).fill]"
    light = opened.run(colours)
    opened.look(390, dark=True)
    assert opened.run("return document.documentElement.scrollWidth") == 390
    dark = opened.run(colours)
    assert all(light_colour != dark_colour for light_colour, dark_colour in zip(light, dark, strict=True))


def test_hostile_text_is_escaped(tmp_path, browser):
    home = tmp_path / "hostile"
    names = [HOSTILE.replace("/", "∕"), "other"]
    for name in names:
        folder = make_run(home / name, versions={"torch": HOSTILE})
        evaluate(folder, [1.0, 0.0], texts=[(HOSTILE, HOSTILE + "\u202e\x07"), ("b", HOSTILE)])
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": {HOSTILE: {}}, "data": {"dataset": HOSTILE}}))
    (home / "other" / "failed.txt").write_text(HOSTILE)
    page, _, _ = write_report(home, tmp_path / "out")
    browser.console(), browser.requests()
    browser.open(page)
    assert browser.run("return window.hacked === undefined")
    assert browser.run("return document.images.length") == 0
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [browser.run("return location.href")]
    prompt = browser.run("return document.querySelector('.prompt').textContent")
    assert prompt == HOSTILE
    response = browser.run("return document.querySelector('.card:nth-child(2) pre').textContent")
    assert response == HOSTILE + 2 * "\N{REPLACEMENT CHARACTER}"
    assert browser.run("return document.querySelectorAll('figcaption').length") > 0
