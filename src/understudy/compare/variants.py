"""Variants of recipes that are compared: overrides, a sweep over one option's values, and a budget for all."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import Recipe, RecipeError, load
from ..recipe.yaml_text import value_of
from ..run.folder import RunFolder
from ..teachers import TEACHERS


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides; its folder has the same name."""

    name: str
    recipe: Path
    overrides: tuple[str, ...] = ()
    swept: tuple[str, str] | None = None  # the option that a sweep sets, and its value as it was written

    def load(self, *overrides: str) -> Recipe:
        """The recipe, with the variant's overrides and further ones."""
        return load(self.recipe, [*self.overrides, *overrides])

    def recipe_in(self, folder: RunFolder, seed: int) -> Recipe:
        """The recipe of the run in this folder."""
        output_dir = f"training.output_dir={json.dumps(str(folder.path))}"
        return self.load(output_dir, f"training.seed={seed}", "training.disable_tqdm=true")

    @property
    def place(self) -> str:
        """Its folder in that of the comparison: the recipe's name and, in a sweep, another one for the value."""
        parts = [self.name]
        if self.swept is not None and self.name.startswith(f"{self.recipe.stem} "):
            parts = [self.recipe.stem, self.name.removeprefix(f"{self.recipe.stem} ")]
        return "/".join(map(_file_name, parts))

    def folder(self, output: Path, seed: int) -> RunFolder:
        """Where the run of this variant and seed is."""
        return RunFolder(output / self.place / f"seed-{seed}")


_LONGEST = 80  # characters of a folder's name


def _file_name(text: str) -> str:
    """The text as the name of one folder; a hash replaces what a name cannot hold, such as "/"."""
    plain = re.sub(r"[^\w .,=+@%()\[\]{}~'-]", "_", text)[:_LONGEST]
    if plain == text and text.strip(" .") == text and text:
        return text
    return f"{plain.strip(' .') or '_'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def variants(recipes: Sequence[Path], overrides: Sequence[str] = (), sweep: str | None = None) -> list[Variant]:
    """A variant for each recipe, or for each recipe and value of a `sweep` such as "method.gkd.on_policy=0,0.5,1".

    Raises:
        RecipeError: for two recipes of the same name, and a sweep without values.
    """
    plain = [Variant(path.stem, path, tuple(overrides)) for path in recipes]
    variants = plain if sweep is None else _swept(plain, sweep)
    names = [variant.name for variant in plain]
    if len(set(names)) < len(names):
        raise RecipeError("two of the recipes have the same file name, which names their runs: rename one")
    return variants


def _swept(variants: Sequence[Variant], sweep: str) -> list[Variant]:
    """A variant for each of these and each value of the sweep."""
    key, _, values = sweep.partition("=")
    if not key or not values:
        example = "training.learning_rate=1e-3,1e-4"
        raise RecipeError(f"a sweep is written key=value,value,…, such as {example}, not {sweep}")
    written = values.split(",")
    if twice := [value for value in written if written.count(value) > 1]:
        raise RecipeError(f'the sweep over {key} has the value "{twice[0]}" twice: give every value once')
    option = key.rpartition(".")[2]
    return [
        Variant(f"{v.name} {option}={value}", v.recipe, (*v.overrides, f"{key}={value}"), (key, value))
        for v in variants
        for value in written
    ]


def budget_override(text: str) -> str:
    """The override that gives a recipe the budget `tokens=100000` or `seconds=60`, instead of its own.

    Raises:
        RecipeError: for anything else; the amount is checked with the recipe.
    """
    kind, _, amount = text.partition("=")
    if kind not in ("tokens", "seconds") or not amount:
        raise RecipeError(f"a budget is written tokens=N or seconds=N, such as tokens=100000, not {text}")
    return f"budget={{{kind}: {amount}}}"


def sweep_record(variants: Sequence[Variant]) -> dict[str, Any] | None:
    """The option of a sweep, and each variant's recipe and value, as parsed by YAML and as written."""
    points = {
        variant.name: {"recipe": variant.recipe.stem, "value": value_of(variant.swept[1]), "written": variant.swept[1]}
        for variant in variants
        if variant.swept is not None
    }
    return {"option": variants[0].swept[0], "points": points} if points and variants[0].swept else None


def common_dataset(variants: Sequence[Variant]) -> str:
    """The dataset of all recipes.

    Raises:
        RecipeError: if they have several.
    """
    datasets = {variant.load().data.dataset for variant in variants}
    if len(datasets) > 1:
        raise RecipeError(
            "the recipes have different datasets: name the one on which all students are evaluated, with --data"
        )
    return next(iter(datasets))


def reference_models(recipes: Sequence[Recipe]) -> dict[str, str]:
    """The names of the models that students are compared with: teacher and warm start, where all recipes share one."""
    teachers = {recipe.build("teacher", TEACHERS).model_name for recipe in recipes if recipe.teacher}
    starts = {recipe.student.model for recipe in recipes}
    models = {"teacher": teachers, "warm start": starts}
    return {name: str(next(iter(paths))) for name, paths in models.items() if len(paths) == 1 and None not in paths}
