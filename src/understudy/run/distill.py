"""Run a recipe: build, train or resume, and save the student and its results.

A run lives in one folder, `training.output_dir`:

    recipe.yaml     the resolved recipe            metrics.jsonl   every log line
    .understudy     marks the files as a run's     before.json     the distance to the teacher before training
    inputs.json     hashes of data and models      .understudy.lock   held while a process trains here
    checkpoint-N/   to resume from                 samples.jsonl   sample responses during training
    student/        the trained student            run.json        versions, hardware, counts, seconds, final metrics

The same command again resumes an interrupted run from its last complete checkpoint.
"""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console
from torch import nn

from ..evaluation.evaluate import distance
from ..files import write_atomic
from ..recipe import Recipe
from ..step import Step
from ..teacher import Capability
from ..terminal import is_first_process, show, working
from ..training.checkpoint import damaged, step_of
from ..training.signals import Interrupted, StopOnSignal
from ..training.teacher_failure import checkpoint_on_failure
from .arguments import training_arguments
from .build import Run, build
from .folder import RunFolder
from .lock import check_unlocked, locked
from .overview import show_overview
from .save import save_student
from .summary import summarize

logger = logging.getLogger(__name__)


def distill(
    recipe: Recipe, restart: bool = False, accept_changes: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run a recipe to its end and return the content of its run.json.

    Args:
        restart: delete the earlier run in the folder and begin again.
        accept_changes: resume though recipe, data, models or packages are not those of the run's beginning.

    Raises:
        RecipeError: for what is wrong with the recipe, before anything is computed.
        Interrupted: after Ctrl-C, SIGTERM or the end of the terminal, with a checkpoint saved, or without one (see
            `save_strategy`) at the end of training, with the run finished first.
    """
    console = (console or get_console()) if is_first_process() else Console(quiet=True)
    arguments = training_arguments(recipe)
    folder = RunFolder(Path(arguments.output_dir or "."))
    is_first = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        folder.check_free(recipe, restart, accept_changes)
        if is_first:
            check_unlocked(folder, recipe)
    if (summary := _finished(folder, recipe, restart, accept_changes, console)) is not None:
        return summary

    with working("loading data and models", console):
        run = build(recipe, arguments, console)
    if not restart:
        folder.check_unchanged(recipe, run.inputs, accept_changes)
    run.trainer.accelerator.wait_for_everyone()  # nothing is deleted before every process has built its run
    with locked(folder, recipe) if is_first else nullcontext():
        with arguments.main_process_first(local=False):
            if (summary := _finished(folder, recipe, restart, accept_changes, console)) is not None:
                return summary  # another process has ended the run meanwhile
            accepted = [] if restart else folder.changes(recipe, run.inputs)
            if is_first:
                folder.claim(recipe, restart, accept_changes)
        return _train(run, accepted, console)


def _finished(
    folder: RunFolder, recipe: Recipe, restart: bool, accept_changes: bool, console: Console
) -> dict[str, Any] | None:
    """The content of run.json, if the run is finished and is not to be run again or to go on."""
    if restart or not folder.is_finished or folder.is_extended_by(recipe, accept_changes):
        return None
    if (summary := folder.read_run_json()) is not None:
        if not summary.keys() >= {"student_samples", "metrics", "steps", "tokens", "seconds", "folder"}:
            raise ValueError(f"{folder.run_json} is not what a run writes: move it away, or restore it")
        show(f"{folder.path} is finished already; --restart runs it again", console)
    return summary


def _train(run: Run, accepted: list[str], console: Console) -> dict[str, Any]:
    """Train or resume; save the student, its results, and the changes since the run began that were accepted."""
    folder, trainer = run.folder, run.trainer
    is_first = trainer.args.process_index == 0
    checkpoint = folder.last_checkpoint()
    for path, reason in damaged(folder.path):
        show(f"{path} is left out: {reason}", console)
    if checkpoint:
        show(f"resuming from {checkpoint}", console)
    show_overview(run, folder.path, console)
    if is_first and (checkpoint is None or accepted or not folder.inputs.is_file()):
        folder.save_inputs(run.inputs, accepted)
    before = _distance_before(run, resumed=checkpoint is not None)
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        step = trainer.state.global_step
        if step_of(folder.last_checkpoint() or "") == step:
            if stop.agree(trainer.args) is not None:
                raise Interrupted(step, stop.signal or 0)
            stop.let_through()  # the same command resumes from here
        with checkpoint_on_failure(trainer):
            summary = _end(run, before)
    if stop.signal is not None:
        raise Interrupted(step, stop.signal, finished=True)
    return summary


def _end(run: Run, before: dict[str, float]) -> dict[str, Any]:
    """Evaluate and save the trained student, and return the content of run.json."""
    folder, trainer = run.folder, run.trainer
    if run.samples is not None:
        run.samples.show_last(trainer.args, trainer.state)
    seconds = {"seconds": trainer.spending.run_seconds, "cpu_seconds": trainer.spending.cpu_seconds}
    metrics = trainer.evaluate() if run.held_out is not None else {}
    after = student_samples(run)
    summary = summarize(run, seconds, metrics) | {"student_samples": {"before": before, "after": after}}
    summary["accepted_changes"] = folder.accepted_changes
    save_student(run)
    if trainer.args.process_index == 0:
        trainer.method.export(folder.path)
        write_atomic(folder.run_json, json.dumps(summary, indent=2))
    return summary


def _distance_before(run: Run, resumed: bool) -> dict[str, float]:
    """The distance to the teacher before training, measured and saved now, or read from the folder in a resumed run.

    A resumed run still has the weights of the start here, so what cannot be read is measured again.
    """
    if resumed and (before := _read_distance(run.folder)) is not None:
        return before
    before = student_samples(run)
    if run.trainer.args.process_index == 0:
        write_atomic(run.folder.before, json.dumps({"student_samples": before}))
    return before


def _read_distance(folder: RunFolder) -> dict[str, float] | None:
    try:
        before = (folder.read_before() or {})["student_samples"]
        return {str(name): float(value) for name, value in before.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None


def student_samples(run: Run, count: int = 64) -> dict[str, float]:
    """The distance of the student to the teacher on its own responses to a few prompts, with fixed random numbers.

    Returns the means of `scores.divergence_metrics` over the responses' tokens; empty where the teacher cannot tell
    the distributions of new responses.
    """
    trainer, teacher = run.trainer, run.teacher
    if teacher is None or not teacher.can(Capability.TOP_K) or not teacher.scores_new_responses:
        return {}
    prompts = run.prompts(count)
    if not prompts:
        logger.warning("no prompt leaves room for a response: the distance on student samples is not measured")
        return {}
    responses = trainer.writers.student(prompts, Step(0, trainer.args.seed))
    assert isinstance(trainer.model, nn.Module)
    return distance(trainer.model, teacher, responses, trainer.vocabulary)
