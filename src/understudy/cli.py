"""The command line. Heavy imports happen inside the commands, so that help and mistakes answer at once."""

import errno
import linecache
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

_INTERRUPTED = 130

app = typer.Typer(
    name="understudy",
    help="Teach a small language model to play the big one's part.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Add --debug to any command for the whole traceback of an error.",
)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, students and sampling.")] = 0,
) -> None:
    """Watch a small model learn arithmetic from a bigger one: no downloads, a few minutes on a laptop."""
    _quiet()
    from .demo import run_demo

    run_demo(folder, quick=quick, seed=seed)


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/playground/gkd.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Dotted, such as training.max_steps=100.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier run left and begin again.")
    ] = False,
) -> None:
    """Train a student as a recipe says. The same command again resumes an interrupted run."""
    from .recipe import load

    described = load(recipe, overrides or [])
    _quiet()
    from .run.distill import distill
    from .terminal import show_run

    show_run(distill(described, restart=restart))


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
    teacher: Annotated[
        str | None, typer.Option(help="Whose distribution to compare with, on the model's answers.")
    ] = None,
    split: Annotated[str, typer.Option(help="The dataset's split.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Evaluate so many rows from the beginning.")] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="ours=theirs, such as completion=de.")] = None,
    template: Annotated[str | None, typer.Option(help="A format string over the data's columns: the prompt.")] = None,
    protocol: Annotated[
        str, typer.Option(help="greedy, or minillm: T = 1, five seeds, 256 + 256 tokens. Options below change it.")
    ] = "greedy",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer; by default 256, or half of the model's window.")
    ] = None,
    max_prompt_length: Annotated[int | None, typer.Option(help="The longest prompt; longer ones keep the end.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Seed of sampling; several give several answers.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Answers written at once; by default as many as is fastest.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Also measure this, such as rouge_l, bleu or chrf.")
    ] = None,
    exposure_bias: Annotated[
        bool, typer.Option("--exposure-bias", help="Let the teacher answer, too: what reading itself costs the model.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Keep every answer here, as JSONL, to go on from.")] = None,
) -> None:
    """Let a model answer a dataset's prompts; say how good the answers are, and how far from a teacher they are."""
    from .evaluation.settings import protocol as named
    from .metrics import check

    lengths = {"max_new_tokens": max_new_tokens, "max_prompt_length": max_prompt_length}
    asked = named(protocol).but(temperature=temperature, seeds=tuple(seed) if seed else None, **lengths)
    renamed = dict(_pair(column) for column in columns or []) or None
    check(metric or [])
    if lm_eval is None and data is None:
        raise ValueError("Missing option '--data': name a dataset, or with --lm-eval tasks")
    _quiet()
    from .terminal import check_measured, progress, show_evaluation

    if output is not None:
        check_measured(output)
    if lm_eval is not None:
        from .evaluation.lm_eval import run_tasks

        result = run_tasks(model, lm_eval.split(","), limit, batch_size)
        return show_evaluation(result, f"{model} on {lm_eval}", output)
    from .evaluation.evaluate_model import Question, judge
    from .recipe import Data

    block = Data(dataset=str(data), split=split, limit=limit, columns=renamed, template=template)
    question = Question(model, block, asked, teacher, tuple(metric or ()), exposure_bias, batch_size, output)
    with progress() as shown:
        result = judge(question, shown)
    show_evaluation(result, f"{model} on {data}", output)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes to compare.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Dotted, for all of them.")] = None,
    sweep: Annotated[
        str | None, typer.Option(help="One option's values, such as method.gkd.on_policy=0,0.5,1.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="What each run may spend: tokens=100000 or seconds=60.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with the seeds 0, 1, …")] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; the cores are shared.")] = 1,
    baseline: Annotated[str | None, typer.Option(help="A recipe's name; the others' differences from it.")] = None,
    data: Annotated[str | None, typer.Option(help="Judge on this dataset (default: the recipes' own).")] = None,
    split: Annotated[str, typer.Option(help="The split to judge on.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Judge on so many rows from the beginning.")] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="Such as bleu, chrf, rouge_l.")] = None,
    temperatures: Annotated[list[float] | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    exposure: Annotated[
        int, typer.Option("--exposure-bias", min=0, help="Measure exposure bias on so many of the prompts.")
    ] = 0,
    output: Annotated[Path, typer.Option(help="Where the runs and the table go.")] = Path("runs/compare"),
    page: Annotated[bool, typer.Option("--report", help="Write the report of it as well.")] = False,
) -> None:
    """Run several recipes with several seeds, judge the students alike, and print a table. Again: goes on."""
    from .recipe import RecipeError

    if missing := [str(path) for path in recipes if not path.is_file()]:
        raise RecipeError(f"there is no recipe {missing[0]}")
    _quiet()
    from .compare.experiment import Trial, budget_override, compare, contestants

    changed = [*(overrides or []), *([budget_override(budget)] if budget is not None else [])]

    trial = Trial(data, split, limit, tuple(temperatures or [0.0]), tuple(metrics or ()), exposure)
    typer.echo(compare(contestants(recipes, changed, sweep), output, trial, seeds, parallel, baseline))
    if page:
        from .report import write_report

        typer.echo(f"report: {write_report([output])[0]}")
    typer.echo(f"everything: {output}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs' folders, or a folder of runs, such as compare's.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="Where it goes; by default report/ in the folder.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=8, help="How many prompts are answered side by side.")] = 4,
    no_models: Annotated[bool, typer.Option("--no-models", help="Load no models: show only answers kept.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again until all runs have ended.")] = False,
) -> None:
    """Write a page, pictures and a JSON file about runs: finished, in progress, or a whole comparison."""
    from . import report as reports
    from .report.folders import find

    find(runs)
    _quiet()
    options = (runs, output, prompts, not no_models)
    path = reports.watch(*options) if watch else reports.write_report(*options)[0]
    typer.echo(f"report: {path}")


@app.command()
def methods() -> None:
    """List the methods with their papers and options."""
    from .methods import METHODS, describe

    for name in METHODS.names():
        typer.echo(describe(name) + "\n")


def main() -> None:
    """Run the command line: a mistake is one sentence and exit code 2, with --debug after a traceback."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        code = _explain(error)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # which some versions of typer make of Ctrl-C themselves
        typer.echo("interrupted", err=True)
    sys.exit(code or 0)


def _explain(error: Exception) -> int:
    """Say what went wrong in a sentence and return the exit code."""
    name = type(error).__name__
    # Errors of the command line's own parsing say more with the option that they are about.
    message = " ".join(str(error.format_message() if hasattr(error, "format_message") else error).split())  # type: ignore
    if name == "Interrupted":
        typer.echo(message, err=True)
        return 130
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in message:
        message = (
            "the disk is full: free some space and run the same command again; it goes on from the last checkpoint"
        )
    elif name == "OutOfMemoryError":
        message = "the GPU's memory is full: lower training.per_device_train_batch_size or the rollout's batch_size"
    elif not _is_meant_for_people(error):
        message = f"unexpected {name}: {message} (probably a bug; --debug shows where)"
    typer.echo(f"error: {message}", err=True)
    return 2


def _is_meant_for_people(error: Exception) -> bool:
    """Was this error raised to be read, by the command line, by the system or by this package, or is it a bug?"""
    ours = type(error).__module__.startswith("understudy.")
    if ours or hasattr(error, "format_message") or isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | ArithmeticError):
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    raised = linecache.getline(frame.f_code.co_filename, line)
    return frame.f_globals.get("__name__", "").startswith("understudy.") and "raise " in raised


def _pair(text: str) -> tuple[str, str]:
    ours, separator, theirs = text.partition("=")
    if not separator:
        raise ValueError(f"--column {text} should be ours=theirs, such as completion=de")
    return ours, theirs


def _quiet() -> None:
    """Let only warnings of libraries through, and none of their progress bars."""
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
