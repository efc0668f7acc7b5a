"""The command line in a terminal of 80 columns and without one: progress, samples, errors, odd encodings."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from folders import described, llama, sums, write
from rich.console import Console

from understudy import cli
from understudy.batch import Example
from understudy.cli.results import show_comparison
from understudy.recipe import load
from understudy.run.dry_run import dry_run
from understudy.run.first_example import rendered
from understudy.terminal import escape, show


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder whose name is markup, with a recipe of six steps."""
    folder = tmp_path_factory.mktemp("home") / "[red]x[" / "red]"
    llama(folder / "teacher")
    sums(folder / "sums.jsonl")
    training = {**described(folder)["training"], "max_steps": 6, "logging_steps": 2, "save_strategy": "no"}
    del training["disable_tqdm"]
    write(folder / "mine.yaml", described(folder, training=training, evaluate={"show": 1}))
    return folder


def command(*arguments):
    return [sys.executable, "-m", "understudy", *map(str, arguments)]


def environment(**changes):
    source = str(Path(cli.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "TERM": "xterm", **changes}


def in_terminal(*arguments) -> str:
    """What a command writes to a terminal of 80 columns."""
    main, child = pty.openpty()
    process = subprocess.Popen(command(*arguments), stdin=child, stdout=child, stderr=child, env=environment())
    os.close(child)
    written = b""
    while select.select([main], [], [], 120)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


def test_a_terminal_shows_a_bar_with_steps_remaining_time_and_loss(home):
    text = in_terminal("distill", home / "mine.yaml", "--restart")
    frames = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame) for frame in re.split(r"[\r\n]", text)]
    bars = [frame for frame in frames if frame.startswith("distil ")]
    assert any(re.search(r" 6/6 \d:\d\d:\d\d  loss \d", bar) for bar in bars), bars
    assert all(len(bar) <= 80 for bar in bars)
    assert "samples of the student after step 6" in frames
    assert f"student: {home}/run/student   everything else: {home}/run" in text.replace("\r\n", "\n")
    colours = set(re.findall(r"\x1b\[(?:1;)?(?:33|36|37|93|96|97)m", text))
    assert not colours, "of which a light terminal shows little"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is visible again"


def test_without_a_terminal_there_is_a_line_for_every_logging_step_in_ascii(home):
    encoding = "ascii"
    done = subprocess.run(
        command("distill", home / "mine.yaml", "--restart"),
        capture_output=True,
        env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0"),
        check=False,
    )
    out = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["2/6", "4/6", "6/6"]
    assert re.search(r"step 4/6  \d:\d\d:\d\d left  loss \d.*  tokens_per_second ", out)
    for line in (r"student +random weights: [\d,]+ parameters, float32 on cpu", r"teacher +.*: [\d,]+ parameters",
                 r"data +12 rows of ", r"training +6 steps of 4 rows", r"folder +"):  # fmt: skip
        assert re.search(line, out), line
    assert "\x1b" not in out
    assert out.count("samples of the student") == 1


def test_a_dry_run_shows_everything_and_writes_nothing(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(home.rglob("*"))
    recipe = load(home / "mine.yaml", [f"training.output_dir={home}/new/run"])
    for options, first in (
        ({"force_terminal": True, "color_system": "standard"}, "0+0=\x1b[0m\x1b[1;32m#### 0</s>\x1b[0m"),
        ({"force_terminal": False}, "0+0=«#### 0</s>»"),
    ):
        console = Console(record=True, width=200, file=(tmp_path / "out").open("w"), **options)
        dry_run(recipe, console=console)
        out = console.export_text(styles=options["force_terminal"])
        assert first in out
        assert "prompts   shortest 4, median 4, 95 % 5, longest 5 tokens" in out
        assert "responses shortest 7" in out
        assert "trains on the dataset's responses and responses that the student generates" in out
        assert f"nothing was written to {home}/new/run" in out
    assert sorted(home.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_table_of_a_comparison_has_columns_in_a_terminal_and_is_markdown_elsewhere(tmp_path):
    rows = ["| model | accuracy (greedy) | seconds |", "|---|---|---|", r"| a\|\[b\] | 2.5 ± 3.5 |  |"]
    table = "\n".join([*rows, "", r"- a\|\[b\], seed 0: no"]) + "\n"
    for is_terminal in (True, False):
        with (tmp_path / "out").open("w", encoding="utf-8") as file:
            show_comparison(table, Console(file=file, width=30, force_terminal=is_terminal, color_system=None))
        lines = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
        if is_terminal:
            assert [line.split() for line in lines if "2.5" in line] == [["a|[b]", "2.5", "±", "3.5"]]
            assert lines[-1] == "- a|[b], seed 0: no"
            assert all(len(line) <= 30 for line in lines)
        else:
            assert lines == [*table.splitlines(), ""]


class Words:
    def decode(self, ids):
        return "".join(f"w{i}" for i in ids)


def test_only_the_tokens_that_are_trained_on_are_marked():
    example = Example([1, 2], [3, 4, 5, 6], trained=[True, False, False, True])
    assert rendered(example, Words(), marks=True).plain == "w1w2«w3»w4w5«w6»"


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/nope]", ":smile:", "a\\[b]", "λ 数\u3000字", "x" * 300])
def test_text_is_shown_as_it_is(text, capsys):
    show(text, Console(force_terminal=True, width=20, _environ={}))
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    "code", ["\x1b", "\x9b", "\x07", "\r", "\b", "\x00", "\x7f", "\u202e", "\u2066", "\ud800", "\x85"]
)
def test_control_codes_are_replaced(code):
    assert escape(f"a{code}b\nc\td") == "a\N{REPLACEMENT CHARACTER}b\nc d"


@pytest.mark.parametrize("character", ["é", "数", "\u3000", "\xa0", "\N{GRINNING FACE}", "👩\u200d🚀", "\n"])
def test_other_characters_stay(character):
    assert escape(character) == character


NUMBERS = {
    "evaluate": {
        "--limit": ("0", "-1", "x"),
        "--max-new-tokens": ("0", "-3"),
        "--max-prompt-length": ("0",),
        "--temperature": ("-0.1", "nan", "inf"),
        "--seed": ("-1", "0.5"),
        "--batch-size": ("0",),
    },
    "compare": {
        "--limit": ("0",),
        "--max-new-tokens": ("0",),
        "--max-prompt-length": ("0",),
        "--temperature": ("-1", "nan"),
        "--seeds": ("0",),
        "--parallel": ("0",),
        "--exposure-bias": ("-1",),
    },
    "report": {"--prompts": ("0", "9")},
    "demo": {"--seed": ("-1",)},
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, value)
        for name, options in NUMBERS.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_a_number_out_of_bounds_names_its_option(name, option, value, monkeypatch, capsys):
    positional = [] if name == "demo" else ["x"]
    monkeypatch.setattr(sys, "argv", ["understudy", name, *positional, option, value])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert re.match(rf"error: Invalid value for '{option}'.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["x", "[1]", "{a: .nan}"])
def test_the_arguments_of_a_chat_template_are_a_mapping(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["understudy", "evaluate", "m", "--data", "d", "--chat-template-kwargs", text])
    with pytest.raises(SystemExit):
        cli.main()
    assert re.match(
        r"error: (--chat-template-kwargs .* should be a mapping|the value .* cannot)", capsys.readouterr().err
    )
