"""Compare recipes: the same data, the same evaluation, several seeds.

    OUTPUT/<variant>/seed-<n>/      a run's folder, and in it evaluation.json, log.txt and responses-*.jsonl
    OUTPUT/reference/               evaluations of the teacher and the warm start
    OUTPUT/comparison.json, .md     every result, and the table

Every run has a process of its own, so that a failed run does not affect the others. The same command again resumes the
comparison: finished runs and evaluations are not repeated.
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation.settings import EvalSettings
from ..files import write_atomic
from ..methods import METHODS
from ..recipe import Recipe, RecipeError, load
from ..rollouts import ROLLOUTS
from ..run import marker
from ..run.distill import distill
from ..run.folder import EVALUATION, RUN, RunFolder
from . import statistics
from .evaluations import (
    EXPOSURE,
    NamedSettings,
    claim,
    evaluate_into,
    named_settings,
    read_result,
    reference_folder,
    with_format_of,
)
from .processes import run_in_processes
from .statistics import Result
from .variants import Variant, reference_models, sweep_record

RECORD, TABLE = "comparison.json", "comparison.md"
COMPARISON = marker.Kind("comparison", (RECORD, TABLE))


@dataclass(frozen=True)
class VariantRun:
    """Train one variant with one seed and evaluate its student; an error is written to failed.txt."""

    variant: Variant
    seed: int
    folder: RunFolder
    settings: NamedSettings

    def __call__(self) -> None:
        claim(self.folder)
        self.folder.failed.unlink(missing_ok=True)
        with self.folder.log.open("a", encoding="utf-8") as log:
            try:
                distill(self.variant.recipe_in(self.folder, self.seed), console=Console(file=log, width=120))
                evaluate_into(self.folder, str(self.folder.student), self.settings)
            except Exception as error:
                traceback.print_exc(file=log)
                write_atomic(self.folder.failed, " ".join(str(error).split()) or type(error).__name__)


@dataclass(frozen=True)
class ReferenceRun:
    """Evaluate a model that students are compared with."""

    model: str
    folder: RunFolder
    settings: NamedSettings

    def __call__(self) -> None:
        evaluate_into(self.folder, self.model, self.settings)


def compare(
    variants: Sequence[Variant],
    output: Path,
    settings: EvalSettings,
    *,
    temperatures: Sequence[float] = (0.0,),
    exposure: int = 0,
    seeds: int = 1,
    parallel: int = 1,
    baseline: str | None = None,
    console: Console | None = None,
) -> str:
    """Run variants with the seeds 0 … seeds − 1, evaluate all students with the same settings, return a Markdown table.

    The teacher and the warm start are evaluated as well, where all variants share them.

    Args:
        settings: of the evaluation; options for reading a row (columns, templates) are taken from each recipe.
        temperatures: each model is evaluated at each of these.
        exposure: measure exposure bias on this many prompts, the first ones; 0: do not measure it.
        baseline: the variant from which the others' differences are computed.

    Raises:
        RecipeError: before anything is run, for a recipe that cannot be read, and an unknown baseline.
    """
    recipes = _check(variants, baseline)
    models = reference_models(recipes)
    if exposure and "teacher" not in models:
        raise RecipeError(
            "exposure bias needs one teacher for all recipes that name one, and there are several or none: compare "
            "recipes of one teacher, or leave --exposure-bias out"
        )
    named = named_settings(settings, temperatures, exposure, models.get("teacher"))
    runs = [
        VariantRun(variant, seed, variant.folder(output, seed), with_format_of(named, recipe))
        for seed in range(seeds)
        for variant, recipe in zip(variants, recipes, strict=True)
    ]
    references = {
        name: ReferenceRun(model, reference_folder(output, model), with_format_of(named, recipes[0]))
        for name, model in models.items()
    }
    _check_folders(output, runs, list(references.values()))
    output.mkdir(parents=True, exist_ok=True)
    marker.mark(output, COMPARISON)
    tasks = [*references.values(), *runs]
    unfinished = [task for task in tasks if isinstance(read_result(task.folder, task.settings), str)]
    run_in_processes(unfinished, parallel, console or Console())
    return _write(output, variants, recipes, runs, references, baseline)


def _check(variants: Sequence[Variant], baseline: str | None) -> list[Recipe]:
    recipes = [variant.load() for variant in variants]
    for recipe in recipes:
        recipe.check("method", METHODS)
        recipe.check("rollout", ROLLOUTS)
    names = [variant.name for variant in variants]
    if baseline is not None and baseline not in names:
        raise RecipeError(f'there is no recipe "{baseline}" for the baseline: choose one of {", ".join(names)}')
    return recipes


def _check_folders(output: Path, runs: Sequence[VariantRun], references: Sequence[ReferenceRun]) -> None:
    """Refuse folders with files of the user, or with finished runs of other settings; changes nothing.

    Finished runs are not repeated, so those of another budget, say, would appear in the table of this one.
    """
    remedy = "give another --output"
    marker.check(output, COMPARISON, remedy)
    for run in runs:
        marker.check(run.folder.path, RUN, remedy)
    for task in (*runs, *references):
        marker.check(task.folder.path, EVALUATION, remedy)
    for run in runs:
        folder = run.folder
        if folder.run_json.is_file() and folder.recipe.is_file():
            recipe = run.variant.recipe_in(folder, run.seed)
            if load(folder.recipe).resolved() != recipe.resolved():
                message = f"{folder.path} holds a finished run of {run.variant.name} with other settings or another"
                raise RecipeError(f"{message} budget: give another --output, or delete it")


def _write(
    output: Path,
    variants: Sequence[Variant],
    recipes: Sequence[Recipe],
    runs: Sequence[VariantRun],
    references: Mapping[str, ReferenceRun],
    baseline: str | None,
) -> str:
    """Write comparison.json and comparison.md, and return the table."""
    results: dict[str, dict[int, Result | str]] = {variant.name: {} for variant in variants}
    for run in runs:
        results[run.variant.name][run.seed] = read_result(run.folder, run.settings)
    reference_results = {name: read_result(run.folder, run.settings) for name, run in references.items()}
    evaluated = {name: result for name, result in reference_results.items() if isinstance(result, Result)}
    rows = statistics.table_rows(results, baseline, evaluated.get("teacher"), evaluated.get("warm start"))
    settings = runs[0].settings
    text = statistics.markdown(rows, _columns(rows, settings), evaluated)
    content: dict[str, Any] = {
        "settings": {name: each.as_dict() for name, each in settings.items()},
        "baseline": baseline,
        "budget": recipes[0].resolved().get("budget") if len({recipe.budget for recipe in recipes}) == 1 else None,
        "sweep": sweep_record(variants),
        "references": {name: asdict(r) if isinstance(r, Result) else r for name, r in reference_results.items()},
        "rows": [asdict(row) for row in rows],
        "runs": {
            name: {run.seed: str(run.folder.path) for run in runs if run.variant.name == name} for name in results
        },
    }
    write_atomic(output / RECORD, json.dumps(content, indent=2))
    write_atomic(output / TABLE, text)
    return text


def _columns(rows: Sequence[statistics.TableRow], settings: NamedSettings) -> list[tuple[str, str]]:
    """The table's columns, (settings' name, metric) each."""
    names = [name for name in settings if name != EXPOSURE]
    metrics = ["accuracy", *dict.fromkeys(metric for each in settings.values() for metric in each.metrics)]
    metrics = [metric for metric in metrics if any(metric in part for row in rows for part in row.metrics.values())]
    columns = [(name, metric) for name in names for metric in metrics]
    columns += [(name, "response_length") for name in names]
    return columns + ([(EXPOSURE, "exposure_bias")] if EXPOSURE in settings else [])
