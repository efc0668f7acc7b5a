"""The command line. Heavy imports happen inside the commands, so that help and usage errors appear at once."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="understudy",
    help="Distil a large language model (teacher) into a small one (student).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Add --debug to any command for the whole traceback of an error.",
)


_Split = Annotated[str, typer.Option(help="The dataset's split to evaluate on.")]
_Limit = Annotated[int | None, typer.Option(help="Evaluate on the first N rows.")]
_Metrics = Annotated[
    list[str] | None, typer.Option("--metric", help="A further metric, such as rouge_l, bleu or chrf.")
]
_MaxNewTokens = Annotated[
    int | None, typer.Option(help="The longest response; by default 256, or half of the model's context length.")
]
_MaxPromptLength = Annotated[int | None, typer.Option(help="The longest prompt; longer ones lose their beginning.")]


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="The folder for the runs.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, as a check.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, students and sampling.")] = 0,
) -> None:
    """Distil a small model that learns arithmetic from a bigger one: no downloads, a few minutes on a laptop."""
    _quiet()
    from .demo import run_demo

    run_demo(folder, quick=quick, seed=seed)


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/playground/gkd.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as training.max_steps=100."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the earlier run in the folder and begin again.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume with another recipe, data, models or packages than it began."),
    ] = False,
) -> None:
    """Train a student by a recipe. The same command again resumes an interrupted run."""
    from .recipe import load

    loaded = load(recipe, overrides or [])
    _quiet()
    from .run.distill import distill
    from .terminal import show_run

    show_run(distill(loaded, restart=restart, accept_changes=accept_changes))


@app.command()
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
    teacher: Annotated[str | None, typer.Option(help="Measure the distance to this model's distributions.")] = None,
    split: _Split = "test",
    limit: _Limit = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="The data's own column names, such as completion=de.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="A format string over the data's columns: the prompt.")] = None,
    protocol: Annotated[
        str, typer.Option(help="greedy, or minillm: T = 1, five seeds, 256 + 256 tokens. Options below change it.")
    ] = "greedy",
    max_new_tokens: _MaxNewTokens = None,
    max_prompt_length: _MaxPromptLength = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Seed of sampling; several give several responses a prompt.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Responses generated at once; by default the fastest number is found.")
    ] = None,
    metric: _Metrics = None,
    exposure_bias: Annotated[
        bool, typer.Option("--exposure-bias", help="Measure exposure bias; the teacher generates responses as well.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSONL file of responses, to resume from.")] = None,
) -> None:
    """Evaluate a model on a dataset: accuracy and text metrics of its responses, and the distance to a teacher."""
    from .metrics import check

    changes = _sampling(protocol, temperature, seed) | _set_options(
        max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length
    )
    column_names = dict(_pair(column) for column in columns or []) or None
    check(metric or [])
    if lm_eval is None and data is None:
        raise ValueError("Missing option '--data': name a dataset, or with --lm-eval tasks")
    _quiet()
    from .terminal import check_measured, show_evaluation

    if output is not None:
        check_measured(output)
    if lm_eval is not None:
        from .evaluation.lm_eval import run_tasks

        result = run_tasks(model, lm_eval.split(","), limit, batch_size)
        return show_evaluation(result, f"{model} on {lm_eval}", output)
    block = {"dataset": str(data), "split": split, "limit": limit, "columns": column_names, "template": template}
    changes |= {"teacher": teacher, "metrics": tuple(metric or ()), "exposure_bias": exposure_bias}
    _evaluate(model, block, {**changes, "batch_size": batch_size}, output)


def _evaluate(model: str, data: dict[str, Any], settings: dict[str, Any], output: Path | None) -> None:
    from .evaluation.evaluate_model import evaluate_model
    from .evaluation.settings import EvalSettings
    from .recipe import Data
    from .terminal import progress, show_evaluation

    with progress() as display:
        result = evaluate_model(model, EvalSettings(Data(**data), **settings), output, display)
    show_evaluation(result, f"{model} on {data['dataset']}", output)


def _sampling(protocol: str, temperature: float | None, seeds: list[int] | None) -> dict[str, Any]:
    """The settings of a protocol, with the options that change them."""
    from .evaluation.settings import protocol as protocol_settings

    changes = _set_options(temperature=temperature, seeds=tuple(seeds) if seeds else None)
    return {**protocol_settings(protocol), **changes}


def _set_options(**options: Any) -> dict[str, Any]:
    """The options that were set on the command line."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
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
    split: _Split = "test",
    limit: _Limit = None,
    max_new_tokens: _MaxNewTokens = None,
    max_prompt_length: _MaxPromptLength = None,
    metrics: _Metrics = None,
    temperatures: Annotated[
        list[float] | None, typer.Option("--temperature", help="Evaluate at this temperature, or several; 0 is greedy.")
    ] = None,
    exposure: Annotated[
        int, typer.Option("--exposure-bias", min=0, help="Measure exposure bias on the first N prompts.")
    ] = 0,
    output: Annotated[Path, typer.Option(help="The folder for runs and table.")] = Path("runs/compare"),
    page: Annotated[bool, typer.Option("--report", help="Write a report as well.")] = False,
) -> None:
    """Run recipes over several seeds, evaluate all students with the same settings, print a table; can be resumed."""
    from .metrics import check
    from .recipe import Data, RecipeError

    if missing := [str(path) for path in recipes if not path.is_file()]:
        raise RecipeError(f"there is no recipe {missing[0]}: name a YAML file, such as those in the folder recipes/")
    check(metrics or [])
    _quiet()
    from .compare.experiment import compare
    from .compare.variants import budget_override, common_dataset, variants
    from .evaluation.settings import EvalSettings

    recipe_variants = variants(
        recipes, [*(overrides or []), *([budget_override(budget)] if budget is not None else [])], sweep
    )
    block = Data(dataset=data or common_dataset(recipe_variants), split=split, limit=limit)
    settings = EvalSettings(block, metrics=tuple(metrics or ()))
    settings = settings.changed(max_new_tokens=max_new_tokens, max_prompt_length=max_prompt_length)
    options: dict[str, Any] = {"temperatures": temperatures or [0.0], "exposure": exposure, "seeds": seeds}
    typer.echo(compare(recipe_variants, output, settings, **options, parallel=parallel, baseline=baseline))
    if page:
        from .report import write_report

        typer.echo(f"report: {write_report([output])[0]}")
    typer.echo(f"everything: {output}")


@app.command()
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
    from . import report as reports
    from .report.folders import find_runs

    find_runs(runs)
    _quiet()
    options = (runs, output, prompts, not no_models)
    path = reports.watch(*options) if watch else reports.write_report(*options)[0]
    typer.echo(f"report: {path}")


@app.command()
def methods() -> None:
    """List the methods with their papers and options."""
    from .methods import METHODS, describe
    from .registry import UnknownName

    for name in METHODS.names():
        try:
            typer.echo(describe(name) + "\n")
        except UnknownName as error:  # an entry point of an installed package that cannot be imported
            typer.echo(f"{name}: {error}\n")


def main() -> None:
    """Run the command line. An error is one sentence with exit code 2; --debug prints its traceback before it."""
    from .run.output import lasting_output
    from .terminal import INTERRUPTED, explain

    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    with lasting_output():
        try:
            code = app(arguments, standalone_mode=False)
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            code = explain(error)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if code == INTERRUPTED:  # some versions of typer return this after Ctrl-C
            typer.echo("interrupted", err=True)
    sys.exit(code or 0)


def _pair(text: str) -> tuple[str, str]:
    column, separator, name = text.partition("=")
    if not separator:
        raise ValueError(f"--column {text} should be column=name, such as completion=de")
    return column, name


def _quiet() -> None:
    """Show only warnings of libraries, and none of their progress bars."""
    import logging
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("understudy").setLevel(logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


if __name__ == "__main__":
    main()
