"""A run's folder: whose it is, what in it took long to compute, and files that are written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import yaml
from transformers import TrainingArguments

from .. import mark
from ..data.examples import Examples
from ..recipe import Recipe, load
from ..recipe_yaml import RecipeError
from ..training.trainer import last_checkpoint

_DEAR = ("student", "teacher_answers.jsonl")  # what takes long to compute, beside checkpoints
_REMEDY = "give another training.output_dir"


def check_free(folder: Path, recipe: Recipe, restart: bool) -> None:
    """Change nothing, and refuse a folder with another recipe's run, or with files that a run would replace.

    Raises:
        RecipeError: naming what is in the way, with the remedy.
    """
    file = folder / "recipe.yaml"
    same = _is_of(file, recipe)
    if not same and file.exists() and file.resolve() == recipe.source.resolve():
        message = f"{folder} is where the recipe itself lies, as recipe.yaml, which the run would overwrite"
        raise recipe.complaint("training.output_dir", f"{message}: {_REMEDY}")
    try:
        mark.check(folder, "run", _REMEDY)
    except ValueError as error:
        raise recipe.complaint("training.output_dir", str(error)) from None
    if not same and not restart and is_dear(folder):
        message = f"{folder} holds a run of another recipe: {_REMEDY}, or --restart to delete that run"
        raise recipe.complaint("training.output_dir", message)
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    if not nearest.is_dir():
        raise _not_writable(folder, recipe, errno.EEXIST if nearest == folder else errno.ENOTDIR)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(folder, recipe, errno.EACCES)


def claim(folder: Path, recipe: Recipe, restart: bool) -> None:
    """Make the folder this recipe's, and delete what an earlier run left there that is not to be gone on from.

    Raises:
        RecipeError: as `check_free`, and where nothing can be written.
    """
    check_free(folder, recipe, restart)
    file = folder / "recipe.yaml"
    same = _is_of(file, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.mark(folder, "run")
        if restart or not same:
            mark.clear(folder, "run", keep=("recipe.yaml",))
        if not same:
            write(file, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise _not_writable(folder, recipe, error.errno) from None


def _not_writable(folder: Path, recipe: Recipe, code: int | None) -> RecipeError:
    reason = os.strerror(code or errno.EIO)
    return recipe.complaint("training.output_dir", f"the run's folder {folder} cannot be written ({reason}): {_REMEDY}")


def is_dear(folder: Path) -> bool:
    """Does a run's folder hold what took long to compute?"""
    return last_checkpoint(folder) is not None or any((folder / name).exists() for name in _DEAR)


def _is_of(file: Path, recipe: Recipe) -> bool:
    """Is this the resolved recipe of a run of `recipe`?"""
    if not file.is_file():
        return False
    try:
        return load(file).resolved() == recipe.resolved()
    except RecipeError:
        return False


def check_unchanged(folder: Path, recipe: Recipe, train: Examples) -> None:
    """Refuse to go on with other data than a run began with: its order and the teacher's answers belong to the rows."""
    file = folder / "before.json"
    if not is_dear(folder) or not file.exists():
        return
    if json.loads(file.read_text(encoding="utf-8"))["fingerprint"] != train.fingerprint:
        message = f"{train.source} is not what it was when the run in {folder} began"
        message += ": restore it, give another training.output_dir, or --restart to delete that run"
        raise recipe.complaint("data.dataset", message)


def write(path: Path, text: str, arguments: TrainingArguments | None = None) -> None:
    """Write a file whole or not at all; with `arguments`, on the main process alone."""
    if arguments is not None and arguments.process_index != 0:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
