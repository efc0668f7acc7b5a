"""Lists of methods, teachers and so on are YAML for recipes; recipes are listed, shown, copied and found by name."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import yaml
from folders import write
from typer.testing import CliRunner

from understudy import metrics
from understudy.cli import app
from understudy.methods import METHODS
from understudy.recipe import RecipeError, load, locate, parse
from understudy.recipe.shipped import folder, named, names
from understudy.rollouts import ROLLOUTS
from understudy.teachers import TEACHERS

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"student": {"model": "some/model"}, "method": "sft", "data": {"dataset": "rows.jsonl"}}


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def blocks(command: str) -> list[dict]:
    """The list as YAML documents, one for each name."""
    texts = printed(command).strip().split("\n\n")
    return [content for content in map(yaml.safe_load, texts) if content is not None]


@pytest.mark.parametrize(
    ("command", "key", "registry"),
    [("methods", "method", METHODS), ("teachers", "teacher", TEACHERS), ("rollouts", "rollout", ROLLOUTS)],
)
def test_a_list_can_be_pasted_into_a_recipe(command, key, registry):
    listed = blocks(command)
    assert [next(iter(block[key])) for block in listed] == registry.names()
    for block in listed:
        recipe = parse({**LEAST, **block})
        recipe.check(key, registry)
        recipe.sampling()


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_with_the_options_that_are_listed_is_the_default_one(name):
    [block] = [block for block in blocks("methods") if name in block["method"]]
    assert parse({**LEAST, **block}).build("method", METHODS) == METHODS.get(name)()


def test_the_divergences_of_the_list_can_be_used():
    listed = blocks("divergences")
    assert {"jensen_shannon": {"beta": 0.5, "normalized": False, "temperature": 1.0, "rescale": False}} in [
        block["divergence"] for block in listed
    ]
    for block in listed:
        parse({**LEAST, "method": {"kd": block}}).build("method", METHODS)


def test_the_metrics_of_the_list_are_all_there_are():
    listed = [name for block in blocks("metrics") for name in block["evaluate"]["metrics"]]
    assert sorted(listed) == metrics.names()


def test_every_method_is_listed_with_its_paper():
    text = printed("methods")
    assert all(METHODS.get(name).paper in text for name in METHODS.names())


def test_a_method_of_another_package_is_listed_and_a_broken_one_does_not_hide_the_others(tmp_path, monkeypatch):
    (tmp_path / "module_of_a_list.py").write_text(
        "import dataclasses\nfrom understudy.method import Method\n\n\n@dataclasses.dataclass\nclass Mine(Method):\n"
        '    """Another method."""\n\n    share: float\n    names: list = dataclasses.field(default_factory=list)\n'
        "    def loss(self, teacher, student, batch): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    places = {"another": "module_of_a_list:Mine", "broken": "not_installed:Mine"}
    offers = EntryPoints(EntryPoint(name, place, "understudy.methods") for name, place in places.items())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **query: offers.select(**query))
    text = printed("methods")
    assert "# Another method.\nmethod:\n  another:\n    share: …  # required\n    names: []\n" in text
    assert "# broken: the method not_installed:Mine cannot be imported" in text
    assert "  gkd:" in text
    sys.modules.pop("module_of_a_list", None)


def test_the_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = [line.split()[0] for line in printed("recipes").splitlines()]
    assert listed == names()
    assert {"playground/gkd", "papers/sft-gpt2-120m-dolly"} <= set(listed)
    text = (ROOT / "recipes" / "playground" / "gkd.yaml").read_text()
    assert printed("recipes", "show", "playground/gkd") == text
    assert "understudy distill gkd.yaml --dry-run" in printed("recipes", "copy", "playground/gkd")
    assert (tmp_path / "gkd.yaml").read_text() == text
    again = CliRunner().invoke(app, ["recipes", "copy", "playground/gkd"])
    assert "gkd.yaml exists already" in str(again.exception)
    with pytest.raises(RecipeError, match=r'no recipe "playground/gdk" .*did you mean "playground/gkd"'):
        named("playground/gdk")


def test_a_recipe_is_found_by_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("playground/gkd", "playground/gkd.yaml", "recipes/playground/gkd.yaml"):
        assert load(name).method[0] == "gkd"
        assert locate(name) == folder() / "playground" / "gkd.yaml"
    with pytest.raises(RecipeError, match='there is no recipe playground/gdk; did you mean "playground/gkd"'):
        load("playground/gdk")
    (tmp_path / "playground").mkdir()
    write(tmp_path / "playground" / "gkd", LEAST)
    assert load("playground/gkd").method[0] == "sft"


def test_the_command_knows_its_version_and_environment():
    assert printed("--version").startswith("understudy 0.")
    rows = dict(line.split(maxsplit=1) for line in printed("env").splitlines())
    assert {"understudy", "python", "platform", "torch", "transformers", "processor", "instructions"} <= rows.keys()


def test_the_shells_completion_is_offered():
    assert "--install-completion" in printed("--help")
