"""Check a comparison before anything is trained: options, recipes, models, data, metrics, folders; loads no weights.

Recipes that differ only in what the checks do not read, such as the learning rate, are checked once.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..evaluation import evaluate_model
from ..evaluation.settings import EvalSettings
from ..models.load import load_config, load_tokenizer
from ..recipe import Recipe, RecipeError, load
from ..run import marker
from ..run.arguments import training_arguments
from ..run.folder import EVALUATION, RUN, RunFolder
from ..run.lock import check_unlocked
from ..run.prepare import prepare
from .evaluations import NamedSettings
from .variants import Variant

_REMEDY = "give another --output"
_SET_BY_COMPARE = {
    "training.seed": "--seeds sets it",
    "training.output_dir": "--output sets it",
    "training.disable_tqdm": "runs of a comparison have no progress bars",
}


class PlannedRun(Protocol):
    """A run that is to be trained."""

    @property
    def variant(self) -> Variant: ...
    @property
    def seed(self) -> int: ...
    @property
    def folder(self) -> RunFolder: ...
    @property
    def settings(self) -> NamedSettings: ...


def check_options(
    settings: EvalSettings, temperatures: Sequence[float], exposure: int, seeds: Sequence[int], parallel: int
) -> None:
    """Check the options of a comparison.

    Raises:
        ValueError: for numbers out of range, and two temperatures of the same name.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compare starts a process for each run itself: start it without torchrun or accelerate launch")
    least = {"--seeds": (len(seeds), 1), "--parallel": (parallel, 1), "--exposure-bias": (exposure, 0)}
    optional = {"--limit": settings.data.limit, "--max-new-tokens": settings.max_new_tokens}
    optional |= {"--max-prompt-length": settings.max_prompt_length}
    least |= {name: (value, 1) for name, value in optional.items() if value is not None}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}, not {value}")
    if not temperatures:
        raise ValueError("there is no --temperature to evaluate at: give 0 for greedy responses")
    for temperature in temperatures:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, not {temperature:g}: 0 is greedy")
    names = [f"{temperature:g}" for temperature in temperatures]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the --temperature {twice[0]} is given twice: give every one once")


def check_variants(variants: Sequence[Variant], baseline: str | None) -> None:
    """Check the variants' names and overrides.

    Raises:
        RecipeError: for no variants, an unknown baseline, two variants of one name, and what a comparison sets itself.
    """
    names = [variant.name for variant in variants]
    if not names:
        raise RecipeError("there is no recipe to compare: name at least one YAML file")
    if baseline is not None and baseline not in names:
        raise RecipeError(f'there is no recipe "{baseline}" for the baseline: choose one of {", ".join(names)}')
    folders = [variant.place for variant in variants]
    if twice := [name for name, place in zip(names, folders, strict=True) if folders.count(place) > 1]:
        raise RecipeError(f'two of the recipes are called "{twice[0]}": rename one')
    for variant in variants:
        for override in variant.overrides:
            key = override.partition("=")[0].strip()
            if key in _SET_BY_COMPARE:
                raise RecipeError(f"{key} cannot be set in a comparison: {_SET_BY_COMPARE[key]}")


def check_folders(output: Path, kind: marker.Kind, runs: Sequence[PlannedRun], references: Sequence[RunFolder]) -> None:
    """Refuse folders with files of the user, or with runs of other settings; changes nothing.

    Finished runs are not repeated, so those of another budget, say, would appear in the table of this one.

    Raises:
        ValueError: naming the file or run that is there, with the remedy.
    """
    marker.check(output, kind, _REMEDY)
    for folder in (*(run.folder for run in runs), *references):
        marker.check(folder.path, EVALUATION, _REMEDY)
    for run in runs:
        folder = run.folder
        marker.check(folder.path, RUN, _REMEDY)
        recipe = run.variant.recipe_in(folder, run.seed)
        if folder.has_results and folder.recipe.is_file() and _content(load(folder.recipe)) != _content(recipe):
            state = "a finished" if folder.run_json.is_file() else "an unfinished"
            message = f"{folder.path} holds {state} run of {run.variant.name} with other settings or another budget"
            raise RecipeError(f"{message}: {_REMEDY}, or delete it")
        folder.check_free(recipe, restart=False)
        check_unlocked(folder, recipe)


def _content(recipe: Recipe) -> dict[str, object]:
    """The resolved recipe without the run's folder, which may be moved."""
    content = recipe.resolved()
    training = {key: value for key, value in content["training"].items() if key != "output_dir"}
    return {**content, "training": training}


def check_inputs(runs: Sequence[PlannedRun], references: Mapping[str, NamedSettings]) -> None:
    """Read the data that is trained and evaluated on, tokenizers and configurations, and check that they fit together.

    Args:
        references: the settings of each model that is evaluated without training, by its name.

    Raises:
        ValueError: in one sentence, for the first recipe or setting that cannot be trained or evaluated.
    """
    checked = set()
    for run in runs:
        recipe = run.variant.recipe_in(run.folder, run.seed)
        content = recipe.resolved()
        unread = {key: content[key] for key in content if key not in ("training", "budget")}
        key = json.dumps([unread, _settings(run.settings)], sort_keys=True, default=str)
        training_arguments(recipe)
        if key in checked:
            continue
        checked.add(key)
        with _naming(run.variant.name):
            configs = prepare(recipe).configs
            for settings in run.settings.values():
                evaluate_model.prepare(configs.tokenizer, configs.student, settings)
    for model, named in references.items():
        with _naming(model):
            tokenizer, config = load_tokenizer(model), load_config(model)
            for settings in named.values():
                if settings.teacher != model:
                    evaluate_model.prepare(tokenizer, config, settings)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the name of a recipe or model to errors for users that do not say where they are."""
    try:
        yield
    except ValueError as error:
        is_located = isinstance(error, RecipeError) and error.located
        if is_located or not type(error).__module__.startswith("understudy."):
            raise
        raise RecipeError(f"{name}: {error}") from error


def _settings(named: NamedSettings) -> dict[str, object]:
    return {name: each.as_dict() for name, each in named.items()}
