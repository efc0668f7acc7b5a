"""Compare recipes: the same data, the same evaluation, several seeds.

    OUTPUT/<variant>/seed-<n>/      a run's folder, and in it evaluation.json, log.txt and responses-*.jsonl
    OUTPUT/reference/               evaluations of the teacher and the warm start
    OUTPUT/comparison.json, .md     every result, and the table

Every run has a process of its own, so that a failed run does not affect the others. The same command again resumes the
comparison: finished runs and evaluations are not repeated.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console

from ..evaluation.response_metrics import with_buckets
from ..evaluation.settings import EvalSettings
from ..files import read_jsonl, write_atomic
from ..recipe import Recipe, RecipeError
from ..run import marker
from ..run.distill import Interrupted, distill
from ..run.folder import RunFolder
from . import statistics
from .checks import check_folders, check_inputs, check_options, check_variants
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
from .table import markdown
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
    max_steps: int | None = None  # of training, where the recipe says it

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def model(self) -> str:
        return str(self.folder.student)

    def __call__(self) -> None:
        with recording(self.folder) as console:
            distill(self.variant.recipe_in(self.folder, self.seed), console=console)
            evaluate_into(self.folder, self.model, self.settings)

    def progress(self) -> float:
        """The share of the training steps that are in the log."""
        if not self.max_steps or not self.folder.metrics.is_file():
            return 0.0
        steps = [line["step"] for line in read_jsonl(self.folder.metrics) if "step" in line]
        return min(1.0, max(steps, default=0) / self.max_steps)

    def result(self) -> Result | str:
        """The student's result, or why there is none."""
        if not self.folder.is_finished:
            return self.folder.read_failed() or "the process was killed"
        return read_result(self.folder, self.model, self.settings)

    def error(self) -> str | None:
        return result if isinstance(result := self.result(), str) else None


@dataclass(frozen=True)
class ReferenceRun:
    """Evaluate a model that students are compared with; an error is written to failed.txt."""

    name: str
    model: str
    folder: RunFolder
    settings: NamedSettings

    def __call__(self) -> None:
        with recording(self.folder):
            evaluate_into(self.folder, self.model, self.settings)

    def progress(self) -> float:
        return 0.0

    def result(self) -> Result | str:
        """The model's result, or why there is none."""
        return read_result(self.folder, self.model, self.settings)

    def error(self) -> str | None:
        return result if isinstance(result := self.result(), str) else None


@contextmanager
def recording(folder: RunFolder) -> Iterator[Console]:
    """Claim a folder; output and warnings go to its log.txt, and an error to failed.txt as well. A signal is no error.

    On the terminal they would be written into the comparison's bar, and would not say which run they are about.
    """
    claim(folder)
    folder.failed.unlink(missing_ok=True)
    with folder.log.open("a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            yield Console(file=log, width=120)
        except Interrupted as error:
            log.write(f"{error}\n")
        except Exception as error:
            traceback.print_exc(file=log)
            write_atomic(folder.failed, " ".join(str(error).split()) or type(error).__name__)


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found."""

    table: str  # in Markdown
    failed: int  # runs and evaluations without a result
    rows: Sequence[statistics.TableRow]  # of the variants
    references: Mapping[str, Result]  # of the teacher and the warm start, where all variants share them


def compare(
    variants: Sequence[Variant],
    output: Path,
    settings: EvalSettings,
    *,
    temperatures: Sequence[float] = (0.0,),
    exposure: int = 0,
    seeds: Sequence[int] = (0,),
    parallel: int = 1,
    baseline: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Run variants with several seeds, and evaluate all students with the same settings.

    The teacher and the warm start are evaluated as well, where all variants share them.

    Args:
        settings: of the evaluation; options for reading a row (columns, templates) are taken from each recipe.
        temperatures: each model is evaluated at each of these.
        exposure: measure exposure bias on this many prompts, the first ones; 0: do not measure it.
        baseline: the variant from which the others' differences are computed.

    Raises:
        ValueError: before anything is run, for options out of range, a recipe that cannot be run, data that cannot be
            read, and files of the user that would be overwritten.
    """
    check_options(settings, temperatures, exposure, seeds, parallel)
    check_variants(variants, baseline)
    recipes = [variant.load() for variant in variants]
    models = reference_models(recipes)
    if exposure and "teacher" not in models:
        raise RecipeError(
            "exposure bias needs one teacher for all recipes that name one, and there are several or none: compare "
            "recipes of one teacher, or leave --exposure-bias out"
        )
    named = named_settings(settings, temperatures, exposure, models.get("teacher"))
    runs = [
        VariantRun(
            variant, seed, variant.folder(output, seed), with_format_of(named, recipe), recipe.training.get("max_steps")
        )
        for seed in seeds
        for variant, recipe in zip(variants, recipes, strict=True)
    ]
    references = [
        ReferenceRun(name, model, reference_folder(output, model), with_format_of(named, recipes[0]))
        for name, model in models.items()
    ]
    check_folders(output, COMPARISON, runs, [reference.folder for reference in references])
    tasks = [*runs, *references]  # the longest first
    unfinished = [task for task in tasks if task.error() is not None]
    if unfinished:
        check_inputs(runs, {reference.model: reference.settings for reference in references})
    output.mkdir(parents=True, exist_ok=True)
    marker.mark(output, COMPARISON)
    record = _record(output, variants, recipes, runs, baseline)
    write_atomic(output / RECORD, json.dumps(record, indent=2))  # a report during the comparison reads it
    run_in_processes(unfinished, parallel, console or get_console())
    return _write(output, record, runs, references)


def _record(
    output: Path,
    variants: Sequence[Variant],
    recipes: Sequence[Recipe],
    runs: Sequence[VariantRun],
    baseline: str | None,
) -> dict[str, Any]:
    """What comparison.json says before there are results."""
    return {
        "settings": {name: each.as_dict() for name, each in runs[0].settings.items()},
        "baseline": baseline,
        "budget": recipes[0].resolved().get("budget") if len({recipe.budget for recipe in recipes}) == 1 else None,
        "sweep": sweep_record(variants),
        "folders": {variant.place: variant.name for variant in variants},
        "runs": {
            variant.name: {run.seed: str(run.folder.path) for run in runs if run.variant.name == variant.name}
            for variant in variants
        },
    }


def _write(
    output: Path, record: Mapping[str, Any], runs: Sequence[VariantRun], references: Sequence[ReferenceRun]
) -> Comparison:
    """Write comparison.json and comparison.md."""
    results: dict[str, dict[int, Result | str]] = {name: {} for name in record["runs"]}
    for run in runs:
        results[run.variant.name][run.seed] = run.result()
    evaluated = {reference.name: reference.result() for reference in references}
    finished = {name: result for name, result in evaluated.items() if isinstance(result, Result)}
    rows = statistics.table_rows(results, record["baseline"], finished.get("teacher"), finished.get("warm start"))
    failed = [f"{name}: {result}" for name, result in evaluated.items() if isinstance(result, str)]
    table = markdown(rows, _columns(rows, runs[0].settings), finished, failed)
    content = {
        **record,
        "references": {name: asdict(r) if isinstance(r, Result) else r for name, r in evaluated.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_atomic(output / RECORD, json.dumps(content, indent=2))
    write_atomic(output / TABLE, table)
    return Comparison(table, len(failed) + sum(len(row.failed) for row in rows), rows, finished)


def _columns(rows: Sequence[statistics.TableRow], settings: NamedSettings) -> list[tuple[str, str]]:
    """The table's columns, (settings' name, metric) each."""
    names = [name for name in settings if name != EXPOSURE]
    numbers = [name for each in settings.values() for name in with_buckets(each.metrics, each.length_buckets)]
    metrics = ["accuracy", *dict.fromkeys(numbers)]
    metrics = [metric for metric in metrics if any(metric in part for row in rows for part in row.metrics.values())]
    columns = [(name, metric) for name in names for metric in metrics]
    columns += [(name, "response_length") for name in names]
    return columns + ([(EXPOSURE, "exposure_bias")] if EXPOSURE in settings else [])
