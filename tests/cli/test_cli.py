"""The command line starts fast: help and usage errors import nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import described, write

from understudy import cli

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")


def imported(*arguments):
    """Run the command line in a process of its own: the modules that it imported, its output."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "understudy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    lines = done.stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    output = done.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
    assert "understudy.cli" in names
    return names, output


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("help", "Usage: "),
        ("nothing", "Usage: "),
        ("help of a command", "--restart"),
        ("a misspelt command", "Did you mean 'distill'?"),
        ("no file", "there is no recipe"),
        ("no YAML", "cannot be read as YAML"),
        ("an unknown key", 'unknown key "studnt"; did you mean "student"?'),
        ("an override", "is not an override"),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(case, sentence, tmp_path):
    (tmp_path / "broken.yaml").write_text("student: {")
    write(tmp_path / "unknown.yaml", {"studnt": {}})
    write(tmp_path / "good.yaml", described(tmp_path))
    arguments = {
        "help": ["--help"],
        "nothing": [],
        "help of a command": ["distill", "--help"],
        "a misspelt command": ["distil"],
        "no file": ["distill", tmp_path / "none.yaml"],
        "no YAML": ["distill", tmp_path / "broken.yaml"],
        "an unknown key": ["distill", tmp_path / "unknown.yaml"],
        "an override": ["distill", tmp_path / "good.yaml", "max_steps"],
    }[case]
    names, output = imported(*arguments)
    assert sentence in output
    assert not names.intersection(HEAVY)


def test_methods_are_listed_with_their_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["understudy", "methods"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "  gkd:\n    on_policy: 1.0\n" in printed


@pytest.mark.parametrize("where", ["understudy.cli.app", "understudy.registry.Registry.names"])
def test_an_interrupted_command_says_so(monkeypatch, capsys, where):
    """Whether typer raises KeyboardInterrupt, or turns it into an exit code as inside a command."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr(sys, "argv", ["understudy", "methods"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_comparison_may_end_with_its_report(monkeypatch, capsys, tmp_path):
    from understudy.compare.experiment import Comparison

    reported = []
    monkeypatch.setattr("understudy.compare.experiment.compare", lambda *_, **__: Comparison("the table", 0, [], {}))
    monkeypatch.setattr("understudy.report.write_report", lambda places: (reported.extend(places) or "page", True))
    write(tmp_path / "sft.yaml", described(tmp_path))
    for options, expected in (([], []), (["--report"], [tmp_path])):
        command = ["understudy", "compare", str(tmp_path / "sft.yaml"), "--output", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        assert reported == expected
        assert ("report: page" in capsys.readouterr().out) == bool(expected)
