"""Reports of folders that anybody may have written, and of many runs and metrics: bounded, an error is one sentence."""

import json

import pytest
import yaml
from test_report import evaluate, logged, make_run, write_report

from understudy.report import drawing
from understudy.report.records import dumps
from understudy.terminal import explain

ODD = [
    None,
    -1,
    "x",
    [1],
    {"a": 1},
    1e308,
    "\ud800",
    "[/red]\x1b[2J",
    float("nan"),
    {"a": {"b": [None]}},
]
PLACES = {
    "run.json": (
        " seed steps seconds tokens metrics metrics/eval_loss versions student_samples student_samples/after budget "
        "machine peak_memory_mb"
    ),
    "evaluation.json": (
        " settings settings/greedy settings/greedy/data settings/greedy/metrics results results/greedy "
        "results/greedy/metrics results/greedy/metrics/accuracy results/greedy/scores results/greedy/scores/accuracy "
        "results/greedy/curves "
        "results/greedy/curves/exposure_bias results/greedy/responses"
    ),
    "before.json": " student_samples",
    "all.metrics.json": " metrics curves curves/distance",
    "recipe.yaml": (
        " student student/model teacher teacher/local teacher/local/model method training training/seed data "
        "data/dataset"
    ),
    "../../comparison.json": " baseline sweep folders sweep/points sweep/points/kd",
}


def write(path, content):
    text = yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def read(path):
    return (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text()) if path.exists() else {}


def error_of(place, output, capsys):
    """The sentence with which a report ends; empty if it is written."""
    try:
        write_report(place, output)
    except Exception as error:
        explain(error)
    message = capsys.readouterr().err
    assert "probably a bug" not in message, message
    return message


@pytest.fixture
def drawn_once(monkeypatch):
    """Charts are described, but not drawn."""
    monkeypatch.setattr("understudy.report.drawing.png", lambda chart, path: None)
    monkeypatch.setattr("understudy.report.page.svg", lambda panel, name: "<svg></svg>")


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("name", PLACES)
def test_a_value_of_another_form_is_left_out_or_named_in_one_sentence(name, tmp_path, capsys):
    home = tmp_path / "home"
    folder = make_run(home / "kd" / "seed-0", "kd")
    evaluate(folder, [1.0, 0.0], bias=2.0)
    evaluate(make_run(home / "gkd" / "seed-0"), [1.0, 1.0])
    point = {"recipe": "kd", "value": 1, "written": "1"}
    write(home / "comparison.json", {"baseline": "kd", "sweep": {"option": "a.b", "points": {"kd": point}}})
    good = read(folder / name)
    for place_of_value in PLACES[name].split(" "):
        keys = [key for key in place_of_value.split("/") if key]
        for odd in ODD:
            content = odd
            if keys:
                content = json.loads(json.dumps(good))
                place = content
                for key in keys[:-1]:
                    place = place.setdefault(key, {})
                place[keys[-1]] = odd
            write(folder / name, content)
            message = error_of(home, tmp_path / "out", capsys)
            assert not message or name.rpartition("/")[2] in message, (keys, odd, message)
    write(folder / name, good)
    write_report(home, tmp_path / "out")


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "recipe.yaml", "../../comparison.json"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 9, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{}"])
def test_a_damaged_file_is_named_in_one_sentence(name, content, tmp_path, capsys):
    folder = make_run(tmp_path / "home" / "kd" / "seed-0", "kd")
    (folder / name).write_bytes(content)
    message = error_of(tmp_path / "home", tmp_path / "out", capsys)
    assert not message or name.rpartition("/")[2] in message


@pytest.mark.usefixtures("drawn_once")
def test_lines_and_responses_of_another_form_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    evaluate(folder, [1.0, 0.0])
    odd = [json.dumps({**logged(9), "step": value, "loss": value, "seconds_learn": value}) for value in ODD]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(odd) + "\n" + "[" * 100_000 + "\n")
    [responses] = folder.glob("responses-greedy.*.jsonl")
    for name in ("seed", "row", "prompt", "response", "references", "tokens", "correct", "truncated"):
        with responses.open("a") as file:
            file.write("".join(json.dumps({"prompt": "a", "response": "b", name: value}) + "\n" for value in ODD))
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps({"step": v, "prompt": v, "student": v}) + "\n" for v in ODD)
    )
    _, _, content = write_report(folder, tmp_path / "out")
    assert content["runs"][0]["series"]["loss"]["step"][:3] == [10, 20, 30]


@pytest.mark.parametrize("name", ["eval/loss", "../../../escaped", "a" * 500, "nul\0", r"back\1slash", "x:y"])
def test_a_metric_of_any_name_has_a_picture_in_the_report_s_folder(name, tmp_path):
    lines = [logged(10, **{name: 1.0, f"{name}?": 2.0}), logged(20, **{name: 2.0, f"{name}?": 1.0})]
    places = [make_run(tmp_path / "home" / run, lines=lines) for run in ("a", "b")]
    write_report(places, tmp_path / "deep" / "out")
    pictures = list((tmp_path / "deep" / "out" / "png").iterdir())
    assert len(pictures) >= 8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_is_complete_or_not_there(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    page, _, _ = write_report(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (page.parent / "png").iterdir()}
    assert all(content.endswith(b"IEND\xaeB`\x82") for content in before.values())
    replaced = []

    def interrupted(path, target):
        replaced.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(folder, tmp_path / "out")
    assert replaced[0].suffix == ".png"
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (page.parent / "png").glob("*.png")} == before


def many(home, count, steps=40, **metrics):
    for index in range(count):
        lines = [logged(step + 1, **metrics) for step in range(steps)]
        evaluate(
            make_run(home / f"recipe{index:03}" / "seed-0", lines=lines), [1.0] * (index % 9 + 1) + [0.0] * 9, bias=3.0
        )
    return home


def test_the_size_of_a_report_grows_with_the_runs_and_not_with_their_square(tmp_path, monkeypatch):
    """Measured by the pictures of one quantity; the others are drawn alike."""
    draw = drawing.svg
    one = "curves-loss"
    monkeypatch.setattr("understudy.report.drawing.png", lambda chart, path: None)
    monkeypatch.setattr("understudy.report.page.svg", lambda panel, name: draw(panel, name) if one in name else "")
    sizes = {}
    for count in (3, 6, 12):
        page, _, _ = write_report(many(tmp_path / f"{count}", count, 4), tmp_path / f"out{count}")
        sizes[count] = page.stat().st_size + (page.parent / "report.json").stat().st_size
    assert sizes[12] - sizes[6] < 2.6 * (sizes[6] - sizes[3])


@pytest.mark.usefixtures("drawn_once")
def test_of_many_recipes_and_metrics_the_first_are_drawn_and_all_are_in_the_file(tmp_path):
    names = {f"metric_{index:04}": 1.0 for index in range(1000)}
    page, _, content = write_report(many(tmp_path / "home", 30, 2, **names), tmp_path / "out")
    assert all(len(run["series"]) >= 1000 for run in content["runs"])
    html = page.read_text()
    assert f"the first {drawing.MOST} of 30 recipes" in html
    assert html.count("<figure>") < drawing.MOST * (drawing.MOST + 5)


def test_lone_surrogates_are_written_as_question_marks():
    assert dumps({"a\ud800": "\udcff"}) == '{\n "a?": "?"\n}\n'


def test_the_runs_of_a_sweep_over_paths_have_the_names_of_the_comparison(tmp_path):
    home = tmp_path / "home"
    for place in ("kd/model=a_b-0123abcd", "kd/model=c"):
        evaluate(make_run(home / place / "seed-0", "kd"), [1.0, 0.0])
    points = {f"kd model={value}": {"recipe": "kd", "value": value, "written": value} for value in ("a/b", "c")}
    folders = {"kd/model=a_b-0123abcd": "kd model=a/b", "kd/model=c": "kd model=c"}
    write(
        home / "comparison.json",
        {"baseline": None, "sweep": {"option": "student.model", "points": points}, "folders": folders},
    )
    _, _, content = write_report(home, tmp_path / "out")
    assert {run["name"] for run in content["runs"]} == set(points)
    assert [point["written"] for point in content["comparison"]["sweep"]["recipes"]["kd"]] == ["a/b", "c"]
    moved = home.rename(tmp_path / "moved")
    assert {run["name"] for run in write_report(moved, tmp_path / "again")[2]["runs"]} == set(points)
