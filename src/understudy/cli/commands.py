"""The commands that work: demo, doctor, distill, evaluate, compare, cache, report."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import get_console

from ..terminal import is_first_process, show
from . import options
from .options import quiet


def demo(
    output: Annotated[Path, typer.Option(help="The folder for the runs.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, as a check.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and sampling.")] = 0,
    samples: Annotated[bool, typer.Option("--samples", help="Print some responses of every student.")] = False,
) -> None:
    """Distil a small model that learns arithmetic from a bigger one: no downloads, a few minutes on a laptop."""
    quiet()
    from ..demo import run_demo

    if run_demo(output, quick, seed, samples).failed:
        raise typer.Exit(1)


def distill(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    restart: options.Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the first example; write and train nothing.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume with another recipe, data, models or packages than it began."),
    ] = False,
) -> None:
    """Train a student by a recipe. The same command again resumes an interrupted run."""
    from ..recipe import load

    loaded = load(recipe, overrides or [])
    quiet()
    from ..run.distill import distill
    from .results import show_run

    if dry_run:
        from ..run.dry_run import dry_run as show_plan

        return show_plan(loaded, restart=restart)
    summary = distill(loaded, restart=restart, accept_changes=accept_changes)
    if is_first_process():
        show_run(summary)


def doctor(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="As distill --restart: an earlier run may be there.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that the run will have, such as torchrun's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for other programs.")] = False,
) -> None:
    """Examine a recipe before it is run: tokens, lengths, teachers, memory and disk, without loading weights.

    Exit code 0: nothing is red. 1: something is red, and the run would fail. 2: this is not a recipe.
    """
    from ..recipe import load

    loaded = load(recipe, overrides or [])
    quiet()
    from ..run.doctor.diagnose import diagnose
    from ..run.doctor.findings import Level
    from ..terminal import working
    from .diagnosis import show_diagnosis, show_findings_as_json

    with working("examining", get_console()):
        diagnosis = diagnose(loaded, restart, processes)
    if is_first_process():
        (show_findings_as_json if as_json else show_diagnosis)(diagnosis)
    if diagnosis.level is Level.RED:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A model by name or folder, or playground:arithmetic.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="A file, a folder, a dataset of the hub, or playground:arithmetic.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness instead, such as mmlu,bbh.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Measure the distance to this teacher: a name, or a recipe's block in {}.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The dataset's configuration on the hub.")] = None,
    split: options.Split = "test",
    limit: options.Limit = None,
    columns: options.Columns = None,
    template: Annotated[str | None, typer.Option(help="A format string over the data's columns: the prompt.")] = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    protocol: Annotated[
        str, typer.Option(help="greedy, or minillm: T = 1, five seeds, 256 + 256 tokens. Options below change it.")
    ] = "greedy",
    max_new_tokens: options.MaxNewTokens = None,
    max_prompt_length: options.MaxPromptLength = None,
    temperature: options.Temperature = None,
    seed: options.Seeds = None,
    batch_size: options.BatchSize = None,
    metric: options.Metrics = None,
    length_buckets: options.LengthBuckets = "",
    exposure_bias: Annotated[
        bool, typer.Option("--exposure-bias", help="Measure exposure bias; the teacher generates responses as well.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSONL file of responses, to resume from.")] = None,
) -> None:
    """Evaluate a model on a dataset: accuracy and text metrics of its responses, and the distance to a teacher."""
    from ..metrics import check

    changes = options.sampling(protocol, temperature, seed) | {"length_buckets": options.bounds(length_buckets)}
    changes |= options.set_options(max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    template_arguments = options.mapping("--chat-template-kwargs", chat_template_kwargs)
    column_names = dict(options.column(column) for column in columns or []) or None
    check(metric or [])
    if lm_eval is None and data is None:
        raise ValueError("Missing option '--data': name a dataset, or with --lm-eval tasks")
    quiet()
    from .results import check_measured, show_evaluation

    if output is not None:
        check_measured(output)
    if lm_eval is not None:
        from ..evaluation.lm_eval import run_tasks

        result = run_tasks(model, lm_eval.split(","), limit, batch_size)
        return show_evaluation(result, f"{model} on {lm_eval}", output)
    block = {"dataset": str(data), "name": name, "split": split, "limit": limit, "columns": column_names}
    block |= {"template": template, "chat_template_kwargs": template_arguments}
    changes |= {"teacher": options.teacher(teacher), "metrics": tuple(metric or ()), "exposure_bias": exposure_bias}
    _evaluate(model, block, {**changes, "batch_size": batch_size}, output)


def _evaluate(model: str, data: dict[str, Any], settings: dict[str, Any], output: Path | None) -> None:
    from ..evaluation.evaluate_model import evaluate_model
    from ..evaluation.settings import EvalSettings
    from ..recipe import Data
    from ..terminal import progress
    from .results import show_evaluation

    with progress() as display:
        result = evaluate_model(model, EvalSettings(Data(**data), **settings), output, display)
    show_evaluation(result, f"{model} on {data['dataset']}", output)


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes to compare.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="An override for all recipes, such as training.max_steps=100.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="One option's values, such as method.gkd.on_policy=0,0.5,1.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Budget of each run: tokens=100000 or seconds=60.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, with the seeds 0, 1, …")] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    baseline: Annotated[
        str | None, typer.Option(help="A recipe's name; every other recipe's difference from it is tested.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Evaluate on this dataset (default: the recipes' own).")] = None,
    split: options.Split = "test",
    limit: options.Limit = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_prompt_length: options.MaxPromptLength = None,
    metrics: options.Metrics = None,
    length_buckets: options.LengthBuckets = "",
    temperatures: options.Temperatures = None,
    exposure: Annotated[
        int, typer.Option("--exposure-bias", min=0, help="Measure exposure bias on the first N prompts.")
    ] = 0,
    output: Annotated[Path, typer.Option(help="The folder for runs and table.")] = Path("runs/compare"),
    page: Annotated[bool, typer.Option("--report", help="Write a report as well.")] = False,
) -> None:
    """Run recipes over several seeds, evaluate all students with the same settings, print a table; can be resumed."""
    from ..metrics import check
    from ..recipe import Data, RecipeError, locate

    recipes = [locate(path) for path in recipes]
    if missing := [str(path) for path in recipes if not path.is_file()]:
        raise RecipeError(f"there is no recipe {missing[0]}: name a YAML file, or one that `understudy recipes` lists")
    check(metrics or [])
    quiet()
    from ..compare.experiment import compare
    from ..compare.variants import budget_override, common_dataset, variants
    from ..evaluation.settings import EvalSettings
    from .results import show_comparison

    recipe_variants = variants(
        recipes, [*(overrides or []), *([budget_override(budget)] if budget is not None else [])], sweep
    )
    block = Data(dataset=data or common_dataset(recipe_variants), split=split, limit=limit)
    settings = EvalSettings(block, metrics=tuple(metrics or ()), length_buckets=options.bounds(length_buckets))
    settings = settings.changed(max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    changes: dict[str, Any] = {"temperatures": temperatures or [0.0], "exposure": exposure, "seeds": range(seeds)}
    comparison = compare(recipe_variants, output, settings, **changes, parallel=parallel, baseline=baseline)
    show_comparison(comparison.table)
    if page:
        from ..report import write_report

        show(f"report: {write_report([output])[0]}")
    show(f"everything: {output}")
    if comparison.failed:
        raise typer.Exit(1)


def cache(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe: a file, or a name such as playground/kd.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as data.limit=100.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder; scores that it holds already are kept.")] = Path(
        "runs/cache"
    ),
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Save the log-probabilities of the K likeliest.")] = 64,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Save hidden rows instead, from which every token's are computed.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is saved; by default float16, of hidden rows bfloat16. Or float32.")
    ] = None,
    responses: Annotated[
        str, typer.Option(help="What is scored: responses of the dataset, or that teacher or student generates.")
    ] = "dataset",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that are scored at once.")] = 32,
    shard_mb: Annotated[float, typer.Option(min=0, help="Size of a file; a killed process loses at most this.")] = 64,
) -> None:
    """Run a recipe's teacher once over its data, and save its scores for `teacher: {cached: …}`; can be resumed."""
    from ..recipe import load

    loaded = load(recipe, overrides or [])
    quiet()
    from ..run.cache import CacheSettings, cache
    from ..terminal import progress
    from .results import show_cache

    settings = CacheSettings("hidden" if hidden else "top_k", top_k, dtype, responses, batch_size, shard_mb)
    with progress() as display:
        summary = cache(loaded, output, settings, display)
    show_cache(summary, output)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs, or a folder that holds some, such as that of compare.", show_default=False
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="The report's folder; by default report/ in RUNS.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=8, help="Prompts whose responses are shown side by side.")] = 4,
    no_models: Annotated[bool, typer.Option("--no-models", help="Load no models; show only saved responses.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Write the report again until all runs have ended.")] = False,
) -> None:
    """Write a report about runs or a comparison, finished or in progress: a page, charts and a JSON file."""
    from .. import report as reports
    from ..report.folders import find_runs

    find_runs(runs)
    quiet()
    arguments = (runs, output, prompts, not no_models)
    path = reports.watch(*arguments) if watch else reports.write_report(*arguments)[0]
    show(f"report: {path}")
