"""The models on disk that a run begins with, which it may not overwrite."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..training import checkpoint


def check_not_overwritten(recipe: Recipe, folder: Path, student: Path) -> None:
    """Refuse a run's folder if the recipe's student or teacher is loaded from it, its student or its checkpoints.

    Args:
        student: where in the folder the trained student is saved.

    Raises:
        RecipeError: naming the model, with the remedy.
    """
    models: list[tuple[str, Any]] = [("student", recipe.student.model)]
    if recipe.teacher is not None:
        models += [("teacher", model) for model in _models(recipe.teacher[1])]
    for name, model in models:
        if not isinstance(model, str) or not Path(model).is_dir():
            continue
        path = Path(model).resolve()
        is_checkpoint = path.parent == folder.resolve() and checkpoint.step_of(path) >= 0
        if path in (folder.resolve(), student.resolve()) or is_checkpoint:
            message = f"the run would overwrite the model {model}, from which its {name} is loaded"
            raise recipe.error("training.output_dir", f"{message}: give another training.output_dir")


def _models(fields: Mapping[str, Any]) -> Iterator[Any]:
    """The models that a block names, those of the blocks in it included."""
    for name, value in fields.items():
        if name == "model":
            yield value
        elif isinstance(value, Mapping):
            yield from _models(value)
