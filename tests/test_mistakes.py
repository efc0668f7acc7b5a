"""Errors of users: one sentence with the place and the remedy, exit code 2, and no traceback.

Each mistake is made through the command line itself. Mistakes in a recipe are found before any weights are read.
"""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch
import transformers
from folders import VOCABULARY, characters, described, jsonl, link_all, llama, sums, write

from understudy import cli
from understudy.training import trainer


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A teacher, models that do not match it, and datasets with and without errors."""
    home = tmp_path_factory.mktemp("things")
    llama(home / "teacher")
    llama(home / "stranger", tokenizer=characters("zyxwvutsrqponmlkjihgfedcba0123456789"))
    llama(home / "narrow", vocab_size=VOCABULARY - 7)
    llama(home / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (home / "mute" / file).unlink()
    shutil.copytree(home / "teacher", home / "broken")
    weights = (home / "broken" / "model.safetensors").read_bytes()
    (home / "broken" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(home / "teacher", home / "unweighted")
    (home / "unweighted" / "model.safetensors").unlink()
    (home / "nothing").mkdir()
    sums(home / "sums.jsonl")
    jsonl(home / "prompts.jsonl", [{"prompt": "1+1="}, {"prompt": "2+2="}])
    jsonl(home / "cut.jsonl", [{"prompt": "1+1=", "completion": "2"}, '{"prompt": "2+2=", "compl'])
    jsonl(home / "columns.jsonl", [{"query": "1+1=", "reply": "2"}])
    jsonl(home / "empty.jsonl", [])
    jsonl(home / "silent.jsonl", [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": " "}])
    (home / "binary.txt").write_bytes(b"once upon a time\n\xff\xfe\x00 there was")
    (home / "story.docx").write_bytes(b"PK")
    return home


@pytest.fixture
def home(tmp_path, things):
    """A folder of its own with the things linked into it."""
    link_all(things, tmp_path)
    return tmp_path


@pytest.fixture
def say(monkeypatch, capfd):
    """Run the command line with these arguments: its exit code, stdout and stderr."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = logging.getLogger()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        handlers, root.handlers = root.handlers, []  # the command line sets up its own
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main()
        finally:
            root.handlers = handlers
        return stop.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(say):
    """Run a command that must fail, and return its one sentence."""

    def run(*arguments):
        code, _, err = say(*arguments)
        assert code == 2, err
        *notes, error = err.splitlines()
        assert all("is read from" in note for note in notes), err  # the log says which column is the prompt
        assert error.startswith("error: "), err
        assert "Traceback" not in err
        assert "unexpected" not in err
        return error.removeprefix("error: ").strip()

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are loaded or created, except on the meta device."""
    without_weights = transformers.AutoModelForCausalLM.from_config

    def fail(*_, **__):
        pytest.fail("a model was loaded although the recipe has a mistake")

    def from_config(*arguments, **options):
        return fail() if torch.get_default_device().type != "meta" else without_weights(*arguments, **options)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", from_config)


def test_no_recipe_file(refused, tmp_path):
    assert "there is no recipe" in refused("distill", tmp_path / "gkd.yaml")
    assert "is a folder" in refused("distill", tmp_path)


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(10))
MERGED = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9) if i else '{x: 1}'}]}}\n" for i in range(10))
TEXTS = {  # the recipe as text, and what is said of it
    "not YAML": ("student: {model: a\nmethod: gkd\n", r"line 2: this cannot be read as YAML"),
    "a tab": ("student:\n\tmodel: a\n", r"line 2: this cannot be read as YAML.*'\\t'"),
    "a key twice": ("method: gkd\ndata: {dataset: a}\nmethod: kd\n", r'line 3: .*the key "method" .*first in line 1'),
    "a key twice, inside": ("data:\n  dataset: a\n  dataset: b\n", r'line 3: .*the key "dataset" .*first in line 2'),
    "empty": ("", r"it is empty; a recipe is"),
    "only comments": ("# later\n", r"it is empty; a recipe is"),
    "a list": ("- student\n- method\n", r"a recipe is a mapping"),
    "prose": ("Please distil the model.\n", r"a recipe is a mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", r"this cannot be read as YAML.*another document"),
    "a block inside itself": ("student: &s\n  options: *s\n", r"line 2: .*contains itself"),
    "a number as key": ("1: a\n", r"line 1: 1: keys should be strings"),
    "a word of YAML's as key": ("data:\n  dataset: a\n  on: b\n", r"line 3: on: keys should be strings"),
    "a list as key": ("? [a, b]\n: c\n", r"line 1: a key is a word, not a list"),
    "many aliases": (ALIASES, r"line \d+: this holds more than 10,000 values, aliases included"),
    "many merged aliases": (MERGED, r"line \d+: this holds more than 10,000 values, aliases included"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, r"mine.yaml.*: blocks are nested more than 20 deep"),
    "deep blocks": ("a: " + "{b: " * 30 + "1" + "}" * 30, r"line 1: blocks are nested more than 20 deep"),
    "a date that is none": ("data: {dataset: !!timestamp 2024-13-45}\n", r"line 1: '2024-13-45' cannot be read"),
    "a long number": (f"budget: {{tokens: {'9' * 5000}}}\n", r"line 1: '9+.* cannot be read: Exceeds the limit"),
    "a large number": (f"budget: {{tokens: {'9' * 17}}}\n", r"line 1: 9{17} is too large a number"),
    "no number": ("training: {learning_rate: .nan}\n", r"line 1: \.nan is not a finite number"),
    "infinity": ("training:\n  learning_rate: 1e999\n", r"line 2: 1e999 is not a finite number"),
    "a set": ("training: !!omap [a]\n", r"line 1: .*"),
    "a large file": ("# " + "x" * 100_000, r"mine.yaml has more than 100,000 bytes; a recipe is a short YAML file"),
    "a control code": ("student: \x1b[31m\n", r"mine.yaml.*cannot be read.*special characters are not allowed"),
    "a Python object": ("student: !!python/object/apply:os.system [ls]\n", r"line 1: this cannot be read"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_not_a_recipe(case, refused, tmp_path):
    text, sentence = TEXTS[case]
    (tmp_path / "mine.yaml").write_text(text)
    message = refused("distill", tmp_path / "mine.yaml")
    assert f"{tmp_path}/mine.yaml" in message
    assert matches(sentence, message)


def test_a_recipe_that_is_no_file_is_not_read(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        assert matches(rf"the recipe {path} is no regular file", refused("distill", path))
    assert matches(r"the recipe x+.yaml cannot be read: File name too long", refused("distill", "x" * 300 + ".yaml"))


def test_foreign_text_in_an_error_is_no_command_to_the_terminal(refused, tmp_path):
    message = refused("distill", write(tmp_path / "mine.yaml", {"\x1b]0;title\x07": "\x1b[2J"}))
    assert "unknown key" in message
    assert message.isprintable()
    folder = tmp_path / "[/red]\x1b[31m"
    folder.mkdir(parents=True)
    assert "[/red]\N{REPLACEMENT CHARACTER}[31m" in refused("distill", folder / "none.yaml")


def test_a_recipe_that_is_not_text(refused, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"student: \xff\xfe")
    assert matches(r"mine.yaml, line 1: this is not valid UTF-8", refused("distill", tmp_path / "mine.yaml"))


# Changes to a recipe that works, and what is said of it. {home} is its folder.
MISTAKES = {
    "no method": ({"method": None}, r'"method" is missing, and every recipe needs it'),
    "no dataset": ({"data": {"max_length": 32}}, r'line 1\d: "data.dataset" is missing, and every data block'),
    "a word that is none": ({"students": {}}, r'line \d+: unknown key "students"; did you mean "student"\?'),
    "a key in the wrong place": (
        {"max_length": 9},
        r'line \d+: unknown key "max_length"; it belongs in the block data',
    ),
    "a misspelt key of data": (
        {"data": {"datset": "a"}},
        r'line \d+: unknown key "data.datset"; did you mean "dataset"',
    ),
    "a text for a block": (
        {"student": "some/model"},
        r"line 1: student has fields, written as `student: {key: value}`",
    ),
    "a wrong type": ({"data": {"dataset": "a", "max_length": "many"}}, r"line \d+: data.max_length: .*integer.*'many'"),
    "a wrong choice": (
        {"data": {"dataset": "a", "on_bad_row": "skp"}},
        r"line \d+: data.on_bad_row: input should be 'error' or 'skip', not 'skp'; did you mean \"skip\"",
    ),
    "a method that is none": ({"method": "gdk"}, r'line \d+: there is no method "gdk"; did you mean "gkd"\?'),
    "a method unlike all": ({"method": "xyzzy"}, r'there is no method "xyzzy"; there are: .*gkd, kd'),
    "two methods": (
        {"method": {"gkd": {}, "kd": {}}},
        r"line \d+: method: write one name, or one name with its fields",
    ),
    "a misspelt field": (
        {"method": {"gkd": {"on_polcy": 1}}},
        r'line \d+: method.gkd has no field "on_polcy"; did you mean "on_policy"\?',
    ),
    "a private field": ({"rollout": {"generate": {"_model": 1}}}, r'rollout.generate has no field "_model"'),
    "a field out of range": ({"method": {"gkd": {"on_policy": 3}}}, r"method.gkd: .*on_policy between 0 and 1, not 3"),
    "a field of the wrong type": (
        {"method": {"gkd": {"on_policy": "often"}}},
        r"line \d+: method.gkd.on_policy: .*number",
    ),
    "beta out of range": (
        {"method": {"gkd": {"divergence": {"jensen_shannon": {"beta": 2}}}}},
        r"line \d+: method.gkd.divergence.jensen_shannon: .*beta.*2",
    ),
    "a divergence that is none": (
        {"method": {"gkd": {"divergence": "reverse_lk"}}},
        r'line \d+: method.gkd.divergence: there is no divergence "reverse_lk"; did you mean "reverse_kl"\?',
    ),
    "no temperature": (
        {"rollout": {"generate": {"temperature": -1}}},
        r"line \d+: rollout.generate: .*temperature >= 0",
    ),
    "a misspelt training key": (
        {"training": {"learning_rte": 1}},
        r"line \d+: transformers' TrainingArguments have no field \"learning_rte\"; did you mean \"learning_rate\"\?",
    ),
    "a learning rate that is none": (
        {"training": {"learning_rate": "fast"}},
        r"training.learning_rate: .*number.*'fast'",
    ),
    "no batch": (
        {"training": {"per_device_train_batch_size": 0}},
        r"line \d+: training.per_device_train_batch_size must be at least 1, not 0",
    ),
    "an optimizer that is none": ({"training": {"optim": "adamx"}}, r"line \d+: training.optim: adamx is not a valid"),
    "a logger that is absent": (
        {"training": {"report_to": "tensorboard"}},
        r"line \d+: training.report_to: .*[tT]ensor[bB]oard",
    ),
    "a logger that is none": ({"training": {"report_to": "tensorbord"}}, r"line \d+: training.report_to: tensorbord"),
    "evaluating on nothing": (
        {"training": {"eval_strategy": "steps"}},
        r"line \d+: evaluating while training needs held-out data: add evaluate.dataset",
    ),
    "a misspelt field of LoRA": (
        {"student": {"model": "{home}/teacher", "peft": {"targetmodules": "all-linear"}}},
        r'mine.yaml, line \d+: LoraConfig has no field "targetmodules"; did you mean "target_modules"',
    ),
    "a module that is not there": (
        {"student": {"model": "{home}/teacher", "peft": {"target_modules": ["q_prj"]}}},
        r"line \d+: student.peft: .*q_prj",
    ),
    "adapters on random weights": (
        {"student": {"fresh": {}, "peft": {"r": 2}}},
        r"line 1: student: adapters alone would be saved.*add merge: true",
    ),
    "merging nothing": ({"student": {"fresh": {}, "merge": True}}, r"line 1: student: merge is for adapters"),
    "a misspelt field of a configuration": (
        {"student": {"fresh": {"hiden_size": 8}}},
        r'line 3: a llama configuration has no field "hiden_size"; did you mean "hidden_size"\?',
    ),
    "a field that fits no model": (
        {"student": {"fresh": {"hidden_size": "big"}}},
        r"line 2: these fields are not a valid (configuration|model): .*hidden_size",
    ),
    "a model type that is none": (
        {"student": {"fresh": {"model_type": "lama"}, "tokenizer": "{home}/teacher"}},
        r'line 3: transformers knows no model_type "lama"; did you mean "llama"\?',
    ),
    "a student from two places": (
        {"student": {"fresh": {}, "layers": [0]}},
        r"line 1: student: a student comes from exactly one of .* has fresh and layers",
    ),
    "a student from nowhere": ({"student": {"dtype": "float32"}}, r"exactly one of .* has none of them"),
    "layers that are not there": (
        {"student": {"layers": [0, 3]}},
        r"line 2: the teacher's layers are numbered from 0 to 2; choose some of these, not \[0, 3\]",
    ),
    "a student cut from nobody": (
        {"student": {"layers": [0], "tokenizer": "{home}/teacher"}, "teacher": None, "method": "sft"},
        r"line 2: a student of the teacher's layers needs a local teacher",
    ),
    "a fresh student of nobody": ({"teacher": None, "method": "sft"}, r"line 1: .*add student.tokenizer"),
    "a dtype that is none": (
        {"student": {"fresh": {}, "dtype": "flaot32"}},
        r"line \d: student.dtype: .*not 'flaot32'; did you mean \"float32\"",
    ),
    "a teacher's dtype that is none": (
        {"teacher": {"local": {"model": "{home}/teacher", "dtype": "bf61"}}},
        r"line \d+: .*bf61",
    ),
    "a teacher of no kind": (
        {"teacher": {"lokal": {}}},
        r'line \d+: there is no teacher "lokal"; did you mean "local"',
    ),
    "a teacher without a model": (
        {"teacher": "local"},
        r'line \d+: teacher.local needs "model": add teacher.local.model',
    ),
    "no teacher": ({"teacher": None, "student": {"model": "{home}/teacher"}}, r"line \d+: gkd needs a teacher: add"),
    "no such folder": (
        {"student": {"model": "{home}/teachr"}},
        r'line \d+: no tokenizer can be loaded from "{home}/teachr" .*there is no such folder',
    ),
    "no such model on the hub": (
        {"student": {"model": "nobody/nothing"}},
        r'loaded from "nobody/nothing" .*check the name',
    ),
    "a folder without a model": (
        {"student": {"model": "{home}/nothing"}},
        r'line \d+: no tokenizer can be loaded from "{home}/nothing" .*must hold a model and its tokenizer',
    ),
    "a model without tokenizer": (
        {"student": {"model": "{home}/mute"}},
        r'line \d+: no tokenizer can be loaded from "{home}/mute" .*must hold a model and its tokenizer',
    ),
    "a model without weights": (
        {"student": {"model": "{home}/unweighted"}},
        r'line \d+: no model can be loaded from "{home}/unweighted" .*must hold a model',
    ),
    "other tokens": (
        {"student": {"model": "{home}/stranger"}},
        r"line \d+: the tokenizers of student and teacher differ in \d+ of 40 and \d+ tokens \('.*' is .*one family",
    ),
    "more tokens than embeddings": (
        {"student": {"model": "{home}/narrow"}},
        rf"line \d+: the tokenizer has {VOCABULARY} tokens and the student has embeddings for {VOCABULARY - 7} only",
    ),
    "more tokens than a fresh one has embeddings": (
        {"student": {"fresh": {"vocab_size": 9}}},
        rf"line \d+: the tokenizer has {VOCABULARY} tokens and the student has embeddings for 9 only",
    ),
    "more tokens than the teacher has embeddings": (
        {"teacher": {"local": {"model": "{home}/narrow"}}, "student": {"model": "{home}/teacher"}},
        r"line \d+: the tokenizer has \d+ tokens and the teacher has embeddings for \d+ only",
    ),
    "a reward for a method that takes none": (
        {"method": "kd", "reward": {"functions": {"understudy.playground.rewards:correct": 1.0}}},
        r"line \d+: kd takes no reward; gkd and opd do",
    ),
    "a reward of nothing": (
        {"reward": {"functions": {}}},
        r"line \d+: reward: a reward needs at least one function or a model",
    ),
    "a reward function that is not there": (
        {"reward": {"functions": {"understudy.playground.rewards:corect": 1.0}}},
        r'line \d+: reward: the module understudy.playground.rewards has no function "corect"',
    ),
    "a reward model that is not there": (
        {"reward": {"model": "{home}/judge"}},
        r'line \d+: no reward model can be loaded from "{home}/judge"',
    ),
    "a reward of half the steps": (
        {
            "method": {"gkd": {"on_policy": 0.5}},
            "reward": {"functions": {"understudy.playground.rewards:correct": 1.0}},
        },
        r"line \d+: method.gkd: gkd's reward is of the student's own responses: it needs on_policy 1",
    ),
    "a share left to no reward": (
        {"method": {"gkd": {"distillation": 0.5}}},
        r"line \d+: method.gkd: gkd with distillation below 1 needs a reward for the rest: give one",
    ),
    "no such dataset": (
        {"data": {"dataset": "{home}/sum.jsonl"}},
        r'there is no file or folder "{home}/sum.jsonl"; did you mean "sums.jsonl"\?',
    ),
    "a line that is cut": (
        {"data": {"dataset": "{home}/cut.jsonl"}},
        r"{home}/cut.jsonl:2: not valid JSON at column \d+",
    ),
    "columns of other names": (
        {"data": {"dataset": "{home}/columns.jsonl"}},
        r"no row of {home}/columns.jsonl has one .*give a completion, output or answer column, or name it with columns",
    ),
    "an empty dataset": ({"data": {"dataset": "{home}/empty.jsonl"}}, r"{home}/empty.jsonl has no rows"),
    "an empty response": ({"data": {"dataset": "{home}/silent.jsonl"}}, r'silent.jsonl:2: the "completion" is empty'),
    "a file of another kind": (
        {"data": {"dataset": "{home}/story.docx"}},
        r'story.docx" is not a supported kind of file',
    ),
    "a text that is binary": (
        {"data": {"dataset": "{home}/binary.txt"}},
        r"binary.txt has NUL bytes, so it is no UTF-8 text",
    ),
    "prompts alone for sft": (
        {"data": {"dataset": "{home}/prompts.jsonl"}, "method": "sft"},
        r"sft trains on responses, and no row of {home}/prompts.jsonl has one",
    ),
    "prompts alone for kd": (
        {"data": {"dataset": "{home}/prompts.jsonl"}, "method": "kd"},
        r'kd trains on responses, and no row of .*prompts.jsonl:1, with the columns "prompt"\); give a completion',
    ),
    "held-out prompts alone for kd": (
        {"evaluate": {"dataset": "{home}/prompts.jsonl"}, "method": "kd"},
        r"kd trains on responses, and no row of {home}/prompts.jsonl has one",
    ),
    "a stop token that there is not": (
        {"rollout": {"generate": {"max_new_tokens": 8, "stop_ids": [-1]}}},
        r"line \d+: the stop token -1 is none of the tokenizer's \d+ tokens, and would end nothing: correct",
    ),
    "a soft prompt longer than the context length": (
        {"method": {"promptkd": {"prompt_tokens": 63}}},
        r"a prompt of 63 tokens .* the context window of 64: lower method\.promptkd\.prompt_tokens",
    ),
    "longer than the context length": (
        {"data": {"dataset": "{home}/sums.jsonl", "max_length": 65}},
        r"line \d+: data.max_length 65 is more than the models' context length 64: lower it",
    ),
    "no room for a prompt": (
        {"rollout": {"generate": {"max_new_tokens": 32}}},
        r"max_length 32 has no room for a prompt and 32 tokens of response; raise max_length",
    ),
    "a task that is none": (
        {"data": {"dataset": "playground:arithmetik"}},
        r"'playground:arithmetik'; the playground has playground:arithmetic",
    ),
    "a teacher of no task": (
        {"teacher": {"local": {"model": "playground:chess"}}},
        r"there is no 'playground:chess'; the playground has playground:arithmetic",
    ),
    "quantization without its library": (
        {"teacher": {"local": {"model": "{home}/teacher", "quantization": {"load_in_4bit": True}}}},
        r"line \d+: .*bitsandbytes",
    ),
    "a damaged file of weights": (
        {"teacher": {"local": {"model": "{home}/broken"}}, "student": {"model": "{home}/teacher"}},
        r'line \d+: no model can be loaded from "{home}/broken" .*a file of weights is damaged',
    ),
    "a student's damaged file of weights": (
        {"student": {"model": "{home}/broken"}},
        r'line \d+: no model can be loaded from "{home}/broken" .*a file of weights is damaged',
    ),
}
AFTER_LOADING = {  # mistakes that only loading can show
    "a module that is not there",
    "a field that fits no model",
    "a model without weights",
    "a teacher's dtype that is none",
    "quantization without its library",
    "a damaged file of weights",
    "a student's damaged file of weights",
}


def filled(value, home):
    if isinstance(value, dict):
        return {key: filled(below, home) for key, below in value.items()}
    return value.replace("{home}", str(home)) if isinstance(value, str) else value


def matches(sentence, message):
    return re.search(sentence, message) or pytest.fail(f"{sentence!r} was not said, but {message!r}")


def recipe_of(home, changes):
    content = described(home, **filled(changes, home))
    content["training"] = {**described(home)["training"], **content["training"]}
    return write(home / "mine.yaml", content)


@pytest.mark.parametrize("case", [case for case in MISTAKES if case not in AFTER_LOADING])
def test_a_mistake_in_a_recipe_is_found_before_weights_are_loaded(case, refused, say, home, no_weights):
    changes, sentence = MISTAKES[case]
    recipe = recipe_of(home, changes)
    said = refused("distill", recipe)
    assert matches(sentence.replace("{home}", str(home)), said)
    code, out, err = say("doctor", recipe)  # it says the same, among everything else
    if code == 2:  # this is no recipe
        assert said == err.splitlines()[-1].removeprefix("error: ")
    else:
        assert code == 1
        assert said in [" ".join(line.split()[1:]) for line in out.splitlines() if line.startswith("red ")]
        assert "unexpected" not in out
        assert {"tokens", "data", "recipe"} <= set(out.splitlines())


@pytest.mark.parametrize("case", sorted(AFTER_LOADING))
def test_a_mistake_that_only_loading_can_detect(case, refused, say, home):
    changes, sentence = MISTAKES[case]
    recipe = recipe_of(home, changes)
    assert matches(sentence.replace("{home}", str(home)), refused("distill", recipe))
    assert say("doctor", recipe)[0] == ("weights" not in case)  # the files of weights are not read


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.max_steps", r'"training.max_steps" is not an override; write key.key=value'),
        ("=5", r'"=5" is not an override'),
        ("training..max_steps=5", r"is not an override"),
        ("trainin.max_steps=5", r'the override "trainin.max_steps=5": unknown key "trainin"; did you mean "training"'),
        ("training.max_step=5", r'the override "training.max_step=5": .*no field "max_step"; did you mean "max_steps"'),
        ("data.dataset.name=a", r'the override "data.dataset.name=a" sets a field of data.dataset, which is '),
        ("method.kd.sft_weight=0.5", r'is for kd, and the method is gkd; to change the method put "method=kd" before'),
        ("method=", r"method: write one name, or one name with its fields: `gkd` or"),
        ("method.gkd.on_policy=3", r"line \d+: method.gkd: .*between 0 and 1, not 3"),
        ("student.merge=perhaps", r'the override "student.merge=perhaps": student.merge: .*boolean'),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override, sentence, refused, home, no_weights):
    assert matches(sentence, refused("distill", recipe_of(home, {}), override))


def test_a_run_that_belongs_to_another_recipe_is_left_alone(refused, say, home):
    recipe = recipe_of(home, {"method": "sft"})
    assert say("distill", recipe)[0] == 0
    before = (home / "run" / "run.json").read_text()
    message = refused("distill", recipe, "training.learning_rate=1")
    assert matches(
        rf"{home}/run holds a run of another recipe, with other values of .*or --restart to delete that run", message
    )
    assert (home / "run" / "run.json").read_text() == before


def test_the_recipe_itself_is_never_overwritten(refused, home):
    recipe = recipe_of(home, {}).rename(home / "recipe.yaml")
    before = recipe.read_text()
    for more in ((), ("--restart",)):
        message = refused("distill", recipe, f"training.output_dir={home}", *more)
        assert matches("contains the recipe itself.*give another training.output_dir", message)
    assert recipe.read_text() == before


@pytest.mark.parametrize("output", ["student", "run/student", "run/checkpoint-2"])
def test_the_model_that_a_run_begins_with_is_never_overwritten(output, refused, home):
    shutil.copytree(home / "teacher", home / output)
    recipe = recipe_of(home, {"student": {"model": str(home / output)}})
    for more in ((), ("--restart",)):
        folder = home / output.partition("/")[0]
        message = refused("distill", recipe, f"training.output_dir={folder}", *more)
        assert matches(rf"overwrite the model {home / output}, from which its student is loaded: give", message)


def test_a_report_is_a_folder(refused, home):
    (home / "run").mkdir()
    recipe_of(home, {}).rename(home / "run" / "recipe.yaml")
    message = refused("report", home / "run", "--output", home / "sums.jsonl")
    assert matches(r"a report is a folder, and .*sums.jsonl is a file: give another --output", message)


def test_a_restart_deletes_nothing_that_a_run_did_not_write(say, home):
    (home / "run").mkdir()
    (home / "run" / "thesis.txt").write_text("the only copy")
    assert say("distill", recipe_of(home, {"method": "sft"}), "--restart")[0] == 0
    assert (home / "run" / "thesis.txt").read_text() == "the only copy"


def test_an_output_dir_that_cannot_be_written(refused, home):
    (home / "file").write_text("in the way")
    message = refused("distill", recipe_of(home, {}), f"training.output_dir={home}/file")
    assert matches(rf"{home}/file cannot be written \(.*\): give another training.output_dir", message)
    message = refused("distill", recipe_of(home, {}), f"training.output_dir={home}/file/run")
    assert matches(rf"{home}/file/run cannot be written", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_dir_without_permission(refused, home):
    (home / "locked").mkdir(mode=0o500)
    message = refused("distill", recipe_of(home, {}), f"training.output_dir={home}/locked")
    assert matches(r"locked cannot be written \(Permission denied\): give another", message)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_full_disk(error, refused, home, monkeypatch):
    import safetensors

    if error == "safetensors":
        error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    def save(*_, **__):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)
    message = refused("distill", recipe_of(home, {"method": "sft"}))
    assert message.startswith("the disk is full: free some space and run the same command again")


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (
            lambda: torch.save(torch.zeros(10**6), "/dev/full"),
            "a checkpoint could not be written, probably because the",
        ),
        (lambda: torch.empty(10**15), "the memory is full: lower training.per_device_train_batch_size"),
        (lambda: bytearray(10**18), "the memory is full: lower training.per_device_train_batch_size"),
    ],
    ids=["torch.save", "torch", "Python"],
)
def test_a_disk_or_memory_that_is_full_in_the_words_of_libraries(fails, sentence, refused, home, monkeypatch):
    if sentence.startswith("a checkpoint") and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr("understudy.training.trainer.StudentTrainer.train", lambda *_, **__: fails())
    assert refused("distill", recipe_of(home, {"method": "sft"})).startswith(sentence)


def test_a_full_gpu(refused, home, monkeypatch):
    def train(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("understudy.training.trainer.StudentTrainer.train", train)
    assert refused("distill", recipe_of(home, {"method": "sft"})).startswith(
        "the GPU's memory is full: lower training."
    )


@pytest.mark.parametrize("bug", ["KeyError", "ValueError", "unpack", "RuntimeError"])
def test_a_bug_is_reported_as_unexpected(bug, say, home, monkeypatch):
    def train(*_, **__):
        if bug == "KeyError":
            {}["deep inside"]
        if bug == "ValueError":
            int("deep inside")
        if bug == "unpack":
            (_,) = []
        torch.zeros(2) @ torch.zeros(3)

    inside = FunctionType(train.__code__, vars(trainer), closure=train.__closure__)  # as a function of understudy
    monkeypatch.setattr("understudy.training.trainer.StudentTrainer.train", inside)
    code, _, err = say("distill", recipe_of(home, {"method": "sft"}))
    assert code == 2
    assert matches(r"^error: unexpected (Key|Value|Runtime)Error: .*--debug shows where", err)


def test_debug_shows_the_traceback_and_then_the_sentence(say, home):
    recipe = recipe_of(home, {"method": "gdk"})
    for arguments in (("--debug", "distill", recipe), ("distill", recipe, "--debug")):
        code, _, err = say(*arguments)
        assert code == 2
        assert err.startswith("Traceback (most recent call last)")
        assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{home}/teacher", "--data", "{home}/nix.jsonl"), r'there is no file or folder "{home}/nix.jsonl"'),
        (("{home}/nix", "--data", "{home}/sums.jsonl"), r'no tokenizer can be loaded from "{home}/nix"'),
        (
            ("{home}/teacher", "--data", "{home}/sums.jsonl", "--teacher", "{home}/stranger"),
            r"the tokenizers of student and teacher differ in \d+ of",
        ),
        (("{home}/teacher",), r"Missing option '--data'"),
        (
            ("{home}/teacher", "--data", "{home}/sums.jsonl", "--column", "answer"),
            r"--column answer should be column=name",
        ),
        (("{home}/teacher", "--data", "{home}/sums.jsonl", "--column", "answr=a"), r'"answr".* did you mean "answer"'),
        (("{home}/teacher", "--data", "{home}/sums.jsonl", "--limit", "0"), r"'--limit': .*greater than or equal to 1"),
        (
            ("{home}/teacher", "--data", "{home}/sums.jsonl", "--max-new-tokens", "64"),
            r"--max-new-tokens 64 leaves no room for a prompt in a context length of 64",
        ),
        (("{home}/teacher", "--data", "{home}/sums.jsonl", "--max-new-tokens", "x"), r"--max-new-tokens"),
        (("{home}/teacher", "--data", "{home}/sums.jsonl", "--temperature", "-1"), r"'--temperature': .*or equal to 0"),
        (
            ("{home}/teacher", "--data", "{home}/sums.jsonl", "--output", os.devnull),
            rf"--output {os.devnull} is a device or pipe: name a file for the responses, such as responses.jsonl",
        ),
        (("playground:chess", "--data", "{home}/sums.jsonl"), r"there is no 'playground:chess'"),
        (("{home}/narrow", "--data", "{home}/sums.jsonl"), r"the model has embeddings for"),
        (("{home}/teacher", "--data", "playground:arithmetic", "--split", "tst"), r"no split 'tst'"),
    ],
)
def test_a_mistake_in_evaluating(arguments, sentence, refused, home, no_weights):
    arguments = filled(dict(enumerate(arguments)), home).values()
    assert matches(sentence.replace("{home}", str(home)), refused("evaluate", *arguments))


def test_an_unknown_command(refused):
    assert matches("No such command 'distil'. Did you mean 'distill'", refused("distil"))
    assert matches("No such option.*--rstart", refused("distill", "a.yaml", "--rstart"))


@pytest.mark.parametrize("changes", [{"students": {}}, {"data": {"dataset": "{home}/cut.jsonl"}}])
def test_a_mistake_in_a_process_of_its_own(changes, home):
    command = [sys.executable, "-m", "understudy", "distill", str(recipe_of(home, changes))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home, env=environment())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def environment():
    source = str(Path(cli.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
