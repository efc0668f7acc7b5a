"""An error in a class or function of a user's own is said to be in it, with its file and line."""

import logging
import re
import sys

import pytest
from folders import described, llama, sums, write

from understudy import cli

METHOD = """
from understudy import Method

class Mine(Method):
    def loss(self, teacher, student, batch):
        {body}
"""
TEACHER = """
from understudy import Capability, LocalTeacher, Teacher

class Mine(Teacher):
    provides = frozenset(Capability)

    def __init__(self, model):
        self.local = LocalTeacher(model)
        self.model_name, self.model = model, self.local.model

    def score(self, batch):
        {body}
"""
ROLLOUT = """
from dataclasses import dataclass
from understudy import GenerateRollout, Rollout

@dataclass
class Mine(Rollout):
    def bind(self, model, tokenizer, author="student"):
        return self

    def generate(self, prompts, sampling, step):
        {body}
"""
REWARD = """
def mine(prompts, responses, rows):
    {body}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    llama(folder / "teacher")
    sums(folder / "sums.jsonl")
    return folder


def run(home, folder, monkeypatch, capfd, source, **changes):
    name = f"own_{abs(hash((source, str(changes))))}"
    (folder / f"{name}.py").write_text(source)
    content = described(home, evaluate={"show": 0}, **changes)
    content["training"]["output_dir"] = str(folder / "run")
    recipe = write(folder / "recipe.yaml", content)
    recipe.write_text(recipe.read_text().replace("OWN", name))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["understudy", "distill", str(recipe)])
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # the command line sets up its own
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        root.handlers = handlers
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert done.value.code == 2
    line = next(i for i, text in enumerate(source.splitlines(), 1) if "BAD" in text)
    return error, re.escape(f"{folder / name}.py, line {line}; --debug")


@pytest.mark.parametrize(
    ("source", "changes", "body", "sentence"),
    [
        (METHOD, {"method": {"OWN:Mine": {}}}, "return batch.missing  # BAD", "Mine.loss raised AttributeError: "),
        (METHOD, {"method": {"OWN:Mine": {}}}, "return [][3]  # BAD", "Mine.loss raised IndexError: list index"),
        (METHOD, {"method": {"OWN:Mine": {}}}, "open('absent.txt')  # BAD", "Mine.loss raised FileNotFoundError: "),
        (METHOD, {"method": {"OWN:Mine": {}}}, "return student.chosen @ teacher.chosen[:1]  # BAD", "Mine.loss raised"),
        (
            TEACHER,
            {"teacher": {"OWN:Mine": {"model": "HOME/teacher"}}},
            "raise ValueError('no answer')  # BAD",
            "Mine.score raised ValueError: no answer",
        ),
        (
            ROLLOUT,
            {"rollout": {"OWN:Mine": {"max_new_tokens": 8}}},
            "return {}['key']  # BAD",
            "Mine.generate raised KeyError: 'key'",
        ),
        (
            REWARD,
            {"method": {"gkd": {"distillation": 0.5}}, "reward": {"functions": {"OWN:mine": 1.0}}},
            "return 1 / 0  # BAD",
            "mine raised ZeroDivisionError: division by zero",
        ),
    ],
    ids=["attribute", "index", "file", "shape", "teacher", "rollout", "reward"],
)
def test_an_error_names_the_own_class_with_file_and_line(
    source, changes, body, sentence, home, tmp_path, monkeypatch, capfd
):
    changes = {key: _placed(value, home) for key, value in changes.items()}
    error, place = run(home, tmp_path, monkeypatch, capfd, source.format(body=body), **changes)
    assert re.search(f"error: {re.escape(sentence)}.*{place}", error), error
    assert "probably" not in error


def _placed(value, home):
    if isinstance(value, dict):
        return {key: _placed(item, home) for key, item in value.items()}
    return value.replace("HOME", str(home)) if isinstance(value, str) else value


def test_a_sentence_of_understudy_s_own_stays_as_it_is(home, tmp_path, monkeypatch, capfd):
    body = "return batch.stream('advantage')  # BAD"
    error, _ = run(home, tmp_path, monkeypatch, capfd, METHOD.format(body=body), method={"OWN:Mine": {}})
    assert error.startswith('error: the method reads the stream "advantage", a number per response token')
