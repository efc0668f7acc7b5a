"""A run's folder: whose it is, what in it took long to compute, and files that are written whole or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

import yaml
from transformers import TrainingArguments

from ..data.examples import Examples
from ..recipe import Recipe, load
from ..recipe_yaml import RecipeError
from ..training.trainer import last_checkpoint

_DEAR = ("student", "teacher_answers.jsonl")  # what takes long to compute, beside checkpoints
_RESULTS = (  # all that a run writes
    *("checkpoint-*", "student", "student.partial", "teacher_answers.jsonl", "soft_prompt"),
    *("metrics.jsonl", "samples.jsonl", "before.json", "run.json", "report"),
)


def claim(folder: Path, recipe: Recipe, restart: bool) -> None:
    """Make the folder this recipe's, and refuse one that belongs to another: nothing computed is overwritten."""
    file = folder / "recipe.yaml"
    same = _is_of(file, recipe)
    if not same and file.exists() and file.resolve() == recipe.source.resolve():
        message = f"{folder} is where the recipe itself lies, as recipe.yaml, which the run would overwrite"
        raise recipe.error("training.output_dir", f"{message}: give another training.output_dir")
    if not same and not restart and is_dear(folder):
        message = f"{folder} holds a run of another recipe: give another training.output_dir, or --restart"
        raise recipe.error("training.output_dir", f"{message} to delete that run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart or not same:
            _clear(folder, _RESULTS)
        if not same:
            write(file, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
        elif not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        message = f"the run's folder {folder} cannot be written ({error.strerror}): give another training.output_dir"
        raise recipe.error("training.output_dir", message) from None


def is_dear(folder: Path) -> bool:
    """Does a run's folder hold what took long to compute?"""
    return last_checkpoint(folder) is not None or any((folder / name).exists() for name in _DEAR)


def _is_of(file: Path, recipe: Recipe) -> bool:
    """Is this the resolved recipe of a run of `recipe`?"""
    if not file.exists():
        return False
    try:
        return load(file).resolved() == recipe.resolved()
    except RecipeError:
        return False


def _clear(folder: Path, names: tuple[str, ...]) -> None:
    """Delete what a run wrote into its folder, and nothing else that may lie there."""
    for name in names:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_unchanged(folder: Path, recipe: Recipe, train: Examples) -> None:
    """Refuse to go on with other data than a run began with: its order and the teacher's answers belong to the rows."""
    file = folder / "before.json"
    if not file.exists() or not is_dear(folder):
        return
    if json.loads(file.read_text(encoding="utf-8"))["fingerprint"] != train.fingerprint:
        message = f"{train.source} is not what it was when the run in {folder} began"
        message += ": restore it, give another training.output_dir, or --restart to delete that run"
        raise recipe.error("data.dataset", message)


def write(path: Path, text: str, arguments: TrainingArguments | None = None) -> None:
    """Write a file whole or not at all; with `arguments`, on the main process alone."""
    if arguments is not None and arguments.process_index != 0:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
