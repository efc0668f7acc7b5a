"""Mutated recipes: every one builds a run or is refused in one sentence, in bounded time, and no file is lost.

Recipes of this repository are shrunk to tiny models and data, then keys and values are deleted, doubled, moved and
replaced by odd ones, and bytes of the text are changed. FUZZ sets their number (`make fuzz`); SEED continues elsewhere.
"""

import copy
import dataclasses
import hashlib
import os
import random
import signal
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from folders import llama, sums
from transformers import TrainingArguments

from understudy.recipe import load
from understudy.recipe.shipped import folder as shipped_recipes
from understudy.run.arguments import training_arguments
from understudy.run.build import build
from understudy.run.folder import RunFolder
from understudy.terminal import _is_for_users

COUNT = int(os.environ.get("FUZZ", "40"))
SEED = int(os.environ.get("SEED", "0"))
SECONDS = 20  # for one recipe
FOLDERS = ("playground", "translation", "tinystories", "papers")
ODD = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        -5,
        2,
        3.5,
        -0.5,
        1e-30,
        1e30,
        2**31,
        2**52,
        -(2**40),
        "",
        " ",
        "no",
        "auto",
        "null",
    ),
    *("x", "[/red]", "\x1b[2J", "é", "../x", "~", "/", "/dev/zero", "a:b", ":", "a:b:c", "os:system", "nan", "inf"),
    *("1e5", "2024-13-45", "{a}", "{0}", "%s", "gkd", "kd", "local", "generate", "reverse_kl", "playground:x", "0x1F"),
    *([], {}, [1], [None], ["a", "a"], [[]], [{}], {"a": 1}, {"": 1}, {"model": "x"}, {"a": {"b": {"c": []}}}, [-1, 0]),
    *(["all"], {"beta": 0.5}, "x" * 5000, "\u202e", "\N{GRINNING FACE}", "a\nb", "\t", [0] * 50),
]
SNIPPETS = [
    *("\t", "&a ", "*a ", "<<: *a\n", "!!binary ", "!!python/object:os.system ", "? ", "- ", ": ", "{", "}", "[", "]"),
    *("'", '"', "|\n", ">\n", "%YAML 1.2\n", "---\n", "...\n", "\0", "\x1b", "\ufeff", ".nan", ".inf", "9" * 400, "#"),
    *("1:30:00", "0o17", "2001-13-40", "!!timestamp x", "!!set {a}", "!!int x", "~", "=", "@", "`", "\r", "\x85"),
]


class TooLong(BaseException):
    """A recipe was neither built nor refused in time."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    llama(folder / "teacher")
    llama(folder / "student", seed=1, num_hidden_layers=1)
    sums(folder / "sums.jsonl")
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("the only copy")
    return folder


def shrunk(path: Path, home: Path) -> dict:
    """A recipe with tiny models and data in place of its own."""
    content = yaml.safe_load(path.read_text())
    student = content["student"]
    if "fresh" in student:
        content["student"] = {"fresh": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}}
        content.setdefault("teacher", {"local": {"model": ""}})
    else:
        student["model"] = str(home / "student")
        student.pop("tokenizer", None)
    if "teacher" in content:
        content["teacher"] = {"local": {"model": str(home / "teacher")}}
    data = {"dataset": str(home / "sums.jsonl"), "max_length": 32, "split": "train"}
    content["data"] = {**{k: v for k, v in content["data"].items() if k in ("limit", "seed")}, **data}
    if content.get("evaluate", {}).get("dataset"):
        content["evaluate"] |= {"dataset": data["dataset"], "metrics": ["rouge_l"]}
    if "corpus" in content:
        content["corpus"] = {"dataset": data["dataset"]}
    [(engine, fields)] = content.get("rollout", {"generate": {}}).items()
    content["rollout"] = {engine: {**fields, "max_new_tokens": 8}}
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        content["training"].pop(key, None)
    content["training"] |= {
        "output_dir": str(home / "run"),
        "use_cpu": True,
        "max_steps": 2,
        "dataloader_num_workers": 0,
    }
    return content


def places(value, path=()):
    """Every place in a recipe, as the keys and indices that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from places(below, (*path, key))


def mutate(content: dict, draw: random.Random, keys: list[str]) -> None:
    """Change one place of a recipe."""
    place = draw.choice(list(places(content)))
    block = content
    for key in place[:-1]:
        block = block[key]
    kind = draw.choice(("replace", "replace", "replace", "delete", "rename", "copy", "add", "wrap"))
    odd = copy.deepcopy(draw.choice(ODD))
    if kind == "replace":
        block[place[-1]] = odd
    elif kind == "delete":
        del block[place[-1]]
    elif kind == "wrap":
        block[place[-1]] = draw.choice([[block[place[-1]]], {"a": block[place[-1]]}, str(block[place[-1]])])
    elif isinstance(block, list):
        block.append(odd)
    elif kind == "rename":
        block[draw.choice([*keys, "x", 1, True, ""])] = block.pop(place[-1])
    elif kind == "copy":
        block[draw.choice(keys)] = copy.deepcopy(draw.choice(list(block.values())))
    else:
        block[draw.choice(keys)] = odd


def mutated(number: int, home: Path) -> str:
    """The text of a mutated recipe; the same for the same number."""
    draw = random.Random(f"{SEED}-{number}")
    recipes = [path for name in FOLDERS for path in sorted((shipped_recipes() / name).glob("*.yaml"))]
    contents = [shrunk(path, home) for path in recipes]
    keys = sorted({str(place[-1]) for content in contents for place in places(content)} | set(training_keys()))
    content = draw.choice(contents)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        mutate(content, draw, keys)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if draw.random() < 0.3:
        position = draw.randrange(len(text))
        text = text[:position] + draw.choice([*SNIPPETS, ""]) + text[position + draw.choice((0, 0, 1, 5)) :]
    return text


def training_keys() -> list[str]:
    """The fields of TrainingArguments, without those of the hub."""
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    return [name for name in names if not name.startswith(("hub", "push"))]


def state_of(folder: Path) -> str:
    """A hash of every file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def outcome(path: Path) -> str:
    """An empty text where the recipe can be built or is refused for users, else the unexpected error."""

    def ring(*_):
        raise TooLong

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        recipe = load(path)
        arguments = training_arguments(recipe)
        RunFolder(Path(arguments.output_dir or ".")).check_free(recipe, restart=False)
        build(recipe, arguments)
    except TooLong:
        return f"longer than {SECONDS} s"
    except Exception as error:
        message = str(error)
        if not _is_for_users(error):
            return f"{type(error).__name__}: {message:.200}"
        return "" if message.strip() else f"{type(error).__name__} without a message"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        AcceleratorState._reset_state()
    return ""


def test_a_mutated_recipe_is_built_or_refused_in_a_sentence(home, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    before, unexpected = state_of(home), {}
    for number in range(COUNT):
        path = tmp_path / "mutated.yaml"
        text = mutated(number, home)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if error := outcome(path):
            unexpected[number] = error
            if "FUZZ" in os.environ:
                (home.parent / f"unexpected-{number}.yaml").write_text(f"# {error!r}\n{text}")
        os.environ.clear()
        os.environ.update(environment)
    assert state_of(home) == before, "a file was changed"
    assert not unexpected, "\n".join(f"{number}: {error}" for number, error in unexpected.items())
