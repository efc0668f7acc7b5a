"""What doctor says of recipes: red, yellow and green sentences, all of them in one go, on a terminal and in a pipe."""

import json
import re
import shutil
from pathlib import Path

import pytest
from folders import VOCABULARY, characters, described, jsonl, llama, sums, write
from rich.console import Console
from typer.testing import CliRunner

from understudy import cli
from understudy.cli.diagnosis import show_diagnosis
from understudy.recipe import load
from understudy.run.doctor.diagnose import diagnose
from understudy.run.doctor.findings import Level, Section

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>{% endif %}"


def with_marks(template=None, eos="</s>"):
    """A tokenizer with marks around messages, of a base or of a chat model; padding is its end token."""
    tokenizer = characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.eos_token = tokenizer.pad_token = eos
    return tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("doctor")
    llama(home / "teacher")
    llama(home / "base", tokenizer=with_marks(), vocab_size=VOCABULARY + 5)
    llama(home / "half", tokenizer=with_marks(TEMPLATE + GENERATION), vocab_size=VOCABULARY + 5)
    llama(home / "chat", tokenizer=with_marks(TEMPLATE + GENERATION, "<|im_end|>"), vocab_size=VOCABULARY + 13)
    llama(home / "stranger", tokenizer=characters("zyxwvutsrqponmlkjihgfedcba0123456789"))
    sums(home / "sums.jsonl")
    jsonl(home / "long.jsonl", [{"prompt": "1+" * 30 + "1=", "completion": "3" * 20}] * 3)
    return home


def examined(home: Path, folder: Path, *overrides: str, processes: int | None = None, **changes):
    return diagnose(load(write(folder / "mine.yaml", described(home, **changes)), overrides), processes=processes)


def said(diagnosis, level: Level) -> str:
    """All sentences of a level, line by line."""
    return "\n".join(f.message for section in diagnosis.sections for f in section.findings if f.level is level)


def section(diagnosis, title: str) -> Section:
    return next(section for section in diagnosis.sections if section.title == title)


def test_a_recipe_without_faults_is_green(home, tmp_path):
    diagnosis = examined(home, tmp_path)
    assert diagnosis.count(Level.RED) == diagnosis.count(Level.YELLOW) == 0
    assert [each.title for each in diagnosis.sections] == ["recipe", "tokens", "data", "teacher", "memory", "disk"]
    assert not (home / "run").exists()


def test_everything_that_is_wrong_is_said_at_once_and_the_rest_is_still_examined(home, tmp_path):
    diagnosis = examined(
        home,
        tmp_path,
        student={"model": str(home / "stranger")},
        data={"dataset": str(home / "sums.jsonl"), "max_length": 999},
        rollout={"generate": {"temperature": -1}},
        evaluate={"metrics": ["rouge_l"]},
    )
    reds = said(diagnosis, Level.RED)
    for sentence in (
        r"line \d+: the tokenizers of student and teacher differ",
        r"line \d+: data.max_length 999 is more than the models' context length 64",
        r"line \d+: rollout.generate: .*temperature >= 0",
        r"line \d+: metrics need held-out data",
    ):
        assert re.search(sentence, reds), reds
    assert {"student", "gradients", "optimizer", "teacher"} <= {row[0] for row in section(diagnosis, "memory").rows}


def test_a_base_student_of_a_chat_teacher(home, tmp_path):
    diagnosis = examined(
        home, tmp_path, student={"model": str(home / "base")}, teacher={"local": {"model": str(home / "chat")}}
    )
    yellows, greens = said(diagnosis, Level.YELLOW), said(diagnosis, Level.GREEN)
    assert "the teacher has a chat template and the student has none" in yellows
    assert "student and teacher end their responses differently ('</s>' and '<|im_end|>')" in yellows
    assert f"student and teacher have the same {VOCABULARY + 2} tokens" in greens
    assert (
        f"embeddings have {VOCABULARY + 5} and {VOCABULARY + 13} rows: those beyond {VOCABULARY + 2} take no" in greens
    )
    assert "padding and EOS are the same token, which is fine" in greens
    assert diagnosis.count(Level.RED) == 0


def test_a_template_that_ends_messages_with_another_token_than_eos(home, tmp_path):
    half = {"model": str(home / "half")}
    diagnosis = examined(home, tmp_path, student=half, teacher={"local": half})
    assert re.search(r"ends a message with <\|im_end\|>, and .* EOS is </s>", said(diagnosis, Level.YELLOW))
    assert re.search(r"ends with any of .*</s> \(2\), .*<\|im_end\|> \(\d+\)", said(diagnosis, Level.GREEN))


def test_prompts_and_responses_that_do_not_fit(home, tmp_path):
    diagnosis = examined(home, tmp_path, data={"dataset": str(home / "long.jsonl"), "max_length": 64})
    yellows = said(diagnosis, Level.YELLOW)
    assert "3 of 3 prompts of" in yellows
    assert "are longer than 56 tokens and lost their beginning" in yellows
    longer = examined(home, tmp_path, "rollout.generate.max_new_tokens=2")
    assert re.search("12 of 12 responses of the data have more than max_new_tokens 2", said(longer, Level.YELLOW))


def test_teachers_elsewhere_and_quantised(home, tmp_path):
    unreachable = examined(
        home, tmp_path, student={"model": str(home / "base")}, teacher={"server": {"url": "http://127.0.0.1:9"}}
    )
    assert "http://127.0.0.1:9" in said(unreachable, Level.RED)
    assert "KV cache, student" in [row[0] for row in section(unreachable, "memory").rows]
    bits = {"local": {"model": str(home / "teacher"), "quantization": {"load_in_4bit": True}}}
    assert "needs bitsandbytes: pip install" in said(examined(home, tmp_path, teacher=bits), Level.RED)
    unused = examined(home, tmp_path, method="sft", student={"model": str(home / "teacher")})
    assert "sft uses no teacher" in said(unused, Level.YELLOW)


def test_what_does_not_fit_is_red_with_a_remedy(home, tmp_path, monkeypatch):
    monkeypatch.setattr("understudy.run.doctor.diagnose._free_memory", lambda device: 20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    reds = said(examined(home, tmp_path, student={"model": str(home / "teacher")}), Level.RED)
    assert re.search(r"the CPU needs about .* of which .* is exact, and 19.5 kB are free: ", reds)
    assert re.search(r"checkpoints and student need .*: lower save_total_limit", reds)


def test_weights_in_half_precision_lose_updates_and_adapters_on_them_do_not(home, tmp_path):
    student: dict[str, object] = {"model": str(home / "teacher"), "dtype": "bfloat16"}
    assert "lose every update below 1/512" in said(examined(home, tmp_path, student=student), Level.YELLOW)
    student |= {"peft": {"r": 2, "target_modules": ["q_proj"]}}
    assert "lose every update" not in said(examined(home, tmp_path, student=student), Level.YELLOW)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_diagnosis_is_wrapped_on_a_terminal_and_a_line_per_finding_in_a_pipe(is_terminal, home, tmp_path):
    diagnosis = examined(home, tmp_path, student={"model": str(home / "stranger")})
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=80, force_terminal=is_terminal, color_system=None, no_color=True)
        show_diagnosis(diagnosis, console)
    lines = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    findings = [line for line in lines if re.match("(red|yellow|green) ", line)]
    assert len(findings) == sum(diagnosis.count(level) for level in Level)
    assert lines[-1].endswith("distill would fail")
    if is_terminal:
        assert all(len(line) <= 80 for line in lines)
    else:
        assert any(line.startswith("red ") and "choose a teacher and a student of one family" in line for line in lines)


@pytest.mark.parametrize(
    ("student", "level", "code"), [("teacher", "green", 0), ("base", "yellow", 0), ("nóne\n", "red", 1)]
)
def test_json_has_the_same_findings_and_exit_code(student, level, code, home, tmp_path):
    changes = {"student": {"model": str(home / student)}, "teacher": {"local": {"model": str(home / "chat")}}}
    if level == "green":
        changes["teacher"] = {"local": {"model": str(home / "teacher")}}
    diagnosis = examined(home, tmp_path, **changes)
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "mine.yaml"), "--json"])
    assert result.exit_code == code
    assert result.stdout.isascii()
    printed = json.loads(result.stdout)
    assert printed["level"] == level
    assert printed["counts"] == {each.value: diagnosis.count(each) for each in Level}
    found = [(each["level"], each["section"]) for each in printed["findings"]]
    assert found == [(f.level.value, each.title) for each in diagnosis.sections for f in each.findings]
    stable = {f.message for each in diagnosis.sections if each.title in ("tokens", "recipe") for f in each.findings}
    assert stable <= {each["message"] for each in printed["findings"]}  # other sections say what is free
