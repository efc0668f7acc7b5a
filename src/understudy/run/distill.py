"""Run a recipe: build, train or resume, and save the student and its results.

A run lives in one folder, `training.output_dir`:

    recipe.yaml     the resolved recipe            metrics.jsonl   every log line
    .understudy     marks the files as a run's     before.json     the distance to the teacher before training
    checkpoint-N/   to resume from                 samples.jsonl   sample responses during training
    student/        the trained student            run.json        versions, hardware, counts, seconds, final metrics

The same command again resumes an interrupted run from its last complete checkpoint.
"""

import json
import logging
import shutil
import time
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
from ..terminal import is_first_process, show
from ..training.callbacks import StopOnInterrupt
from .arguments import training_arguments
from .build import Run, build
from .folder import RunFolder
from .overview import show_overview
from .summary import summarize

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after saving a checkpoint."""


def distill(recipe: Recipe, restart: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return the content of its run.json.

    Raises:
        RecipeError: for what is wrong with the recipe, before anything is computed.
        Interrupted: after Ctrl-C, with a checkpoint saved.
    """
    console = (console or get_console()) if is_first_process() else Console(quiet=True)
    arguments = training_arguments(recipe)
    folder = RunFolder(Path(arguments.output_dir or "."))
    with arguments.main_process_first(local=False):
        folder.check_free(recipe, restart)
    if not restart and folder.is_finished and (summary := folder.read_run_json()) is not None:
        show(f"{folder.path} is finished already; --restart runs it again", console)
        return summary

    run = build(recipe, arguments, console)
    if not restart:
        folder.check_unchanged(recipe, run.train)
    run.trainer.accelerator.wait_for_everyone()  # nothing is deleted before every process has built its run
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            folder.claim(recipe, restart)
    checkpoint = folder.last_checkpoint()
    if checkpoint:
        show(f"resuming from {checkpoint}", console)
    show_overview(run, folder.path, console)
    before = _distance_before(run, resumed=checkpoint is not None)
    interrupt = StopOnInterrupt()
    run.trainer.add_callback(interrupt)
    start, cpu_start = time.perf_counter(), time.process_time()
    run.trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        raise Interrupted(f"stopped after step {run.trainer.state.global_step}; the same command resumes from there")
    if run.samples is not None:
        run.samples.show_last(arguments, run.trainer.state)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    metrics = run.trainer.evaluate() if run.held_out is not None else {}
    after = student_samples(run)
    summary = summarize(run, seconds, metrics) | {"student_samples": {"before": before, "after": after}}
    save_student(run)
    if arguments.process_index == 0:
        run.trainer.method.export(folder.path)
        write_atomic(folder.run_json, json.dumps(summary, indent=2))
    return summary


def _distance_before(run: Run, resumed: bool) -> dict[str, float]:
    """The distance to the teacher before training, measured and saved now, or read from the folder in a resumed run."""
    if resumed:
        return (run.folder.read_before() or {})["student_samples"]
    before = student_samples(run)
    if run.trainer.args.process_index == 0:
        content = {"fingerprint": run.train.fingerprint, "student_samples": before}
        write_atomic(run.folder.before, json.dumps(content))
    return before


def student_samples(run: Run, count: int = 64) -> dict[str, float]:
    """The distance of the student to the teacher on its own responses to a few prompts, with fixed random numbers.

    Returns the means of `scores.divergence_metrics` over the responses' tokens; empty where the teacher provides no
    distribution.
    """
    trainer, teacher = run.trainer, run.teacher
    if teacher is None or not teacher.can(Capability.TOP_K):
        return {}
    prompts = run.prompts(count)
    if not prompts:
        logger.warning("no prompt leaves room for a response: the distance on student samples is not measured")
        return {}
    responses = trainer.writers.student(prompts, Step(0, trainer.args.seed))
    assert isinstance(trainer.model, nn.Module)
    return distance(trainer.model, teacher, responses, trainer.vocabulary)


def save_student(run: Run) -> None:
    """Save the student and its tokenizer in student/ atomically; adapters are merged if the recipe says so."""
    trainer, partial = run.trainer, run.folder.student_partial
    if run.recipe.student.merge:
        model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        if trainer.args.should_save:
            model.save_pretrained(partial)
            run.tokenizer.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.args.should_save:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has the same content
        shutil.rmtree(run.folder.student, ignore_errors=True)
        partial.rename(run.folder.student)
    trainer.accelerator.wait_for_everyone()
