"""A run: what a recipe describes, built, checked before anything is computed, trained and saved.

A run lives in one folder, `training.output_dir`:

    recipe.yaml     the resolved recipe          metrics.jsonl   every log line
    checkpoint-N/   to resume from               samples.jsonl   answers shown as the student learned
    student/        the result                   run.json        versions, hardware, counts, seconds, final metrics

The same command again resumes an interrupted run from its last complete checkpoint.
"""

import copy
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich import get_console
from rich.console import Console
from transformers import TrainingArguments, set_seed

from .answers import KeptAnswers
from .callbacks import ShowSamples, StopOnInterrupt, WriteMetrics
from .batch import Example
from .data import Examples, examples_from_rows, load_examples
from .evaluate import distance
from .method import Method
from .methods import METHODS
from .models import (
    all_stop_ids,
    check_tokenizers,
    load_student,
    load_tokenizer,
    teacher_name,
    tokenizer_name,
    window_of,
)
from .playground.names import is_playground, resolve, rows
from .recipe import Data, Recipe, RecipeError
from .registry import nearest
from .rollouts import ROLLOUTS
from .scores import Knowledge
from .step import Step
from .teachers import TEACHERS
from .trainer import DistillationTrainer, last_checkpoint

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after saving a checkpoint."""


@dataclass
class Run:
    """Everything that a recipe describes, ready to train."""

    recipe: Recipe
    trainer: DistillationTrainer
    folder: Path
    train: Examples
    held_out: Examples | None


def distill(recipe: Recipe, restart: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return the content of its run.json.

    Raises:
        RecipeError: for what is wrong with the recipe, before anything is computed.
        Interrupted: after Ctrl-C, with a checkpoint saved.
    """
    console = console or get_console()
    arguments = training_arguments(recipe)
    folder = Path(arguments.output_dir)
    if restart and arguments.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
    _claim(folder, recipe, arguments)
    if (folder / "run.json").exists() and (folder / "student").exists():
        console.print(f"{folder} is finished already; --restart runs it again")
        return json.loads((folder / "run.json").read_text())

    run = build(recipe, arguments, console)
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        console.print(f"resuming from {checkpoint}")
    before = _remember(folder / "before.json", lambda: own_samples(run))
    watch = StopOnInterrupt()
    run.trainer.add_callback(watch)
    start = time.perf_counter()
    run.trainer.train(resume_from_checkpoint=checkpoint)
    if watch.interrupted:
        raise Interrupted(f"stopped after step {run.trainer.state.global_step}; the same command goes on from there")
    seconds = time.perf_counter() - start
    metrics = run.trainer.evaluate() if run.held_out is not None else {}
    save_student(run)
    summary = _summary(run, seconds, metrics) | {"own_samples": {"before": before, "after": own_samples(run)}}
    if arguments.process_index == 0:
        _write(folder / "run.json", json.dumps(summary, indent=2))
    return summary


def build(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> Run:
    """Build what a recipe describes; everything that can be refused without computing is refused here."""
    set_seed(arguments.seed)
    method: Method = recipe.build("method", METHODS)
    tokenizer = load_tokenizer(tokenizer_name(recipe))
    name = teacher_name(recipe)
    if name is not None:
        check_tokenizers(tokenizer, load_tokenizer(name))
    student = load_student(recipe, name)
    wanted = method.needs > Knowledge.NOTHING or "teacher" in method.authors
    if wanted and recipe.teacher is None:
        raise recipe.complaint("method", f"{recipe.method[0]} needs a teacher: add a block such as `teacher: {{local: {{model: …}}}}`")
    teacher = _teacher(recipe, len(tokenizer)) if wanted else None
    rollout = recipe.build("rollout", ROLLOUTS)
    if rollout.stop_ids is None:
        rollout.stop_ids = all_stop_ids(tokenizer, student, getattr(teacher, "model", None))

    writes = method.authors - {"dataset"}
    window = window_of(student, getattr(teacher, "model", None))
    reserve = rollout.max_new_tokens if writes else 1
    train = load_data(recipe.data, tokenizer, window, reserve)
    if "dataset" in method.authors:
        train.require_responses(recipe.method[0])
    held_out = None
    if recipe.evaluate.dataset is not None:
        look = recipe.evaluate
        other = {"dataset": look.dataset, "split": look.split, "name": look.name, "limit": look.limit}
        held_out = load_data(recipe.data.model_copy(update=other), tokenizer, window, reserve)

    folder = Path(arguments.output_dir)
    teacher_writer = None
    if "teacher" in writes:
        writer = copy.copy(rollout).follow(teacher.model, tokenizer, "teacher")
        teacher_writer = KeptAnswers(writer, folder / "teacher_answers.jsonl")
    trainer = DistillationTrainer(
        student,
        teacher,
        method,
        rollout,
        processing_class=tokenizer,
        teacher_writer=teacher_writer,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[WriteMetrics(folder / "metrics.jsonl")],
    )
    shown = recipe.evaluate
    if shown.show:
        every = shown.show_every or max(arguments.max_steps if arguments.max_steps > 0 else 500, 5) // 5
        source = held_out or train
        examples = [source[i] for i in range(min(shown.show, len(source)))]
        trainer.add_callback(ShowSamples(rollout, examples, tokenizer, every, folder / "samples.jsonl", console))
    return Run(recipe, trainer, folder, train, held_out)


def own_samples(run: Run, count: int = 64) -> dict[str, float]:
    """How far the student is from the teacher on its own answers to a few prompts, drawn alike whenever asked.

    Returns the means of `scores.compare` over the answers' tokens; nothing where no teacher's distribution is known.
    """
    trainer = run.trainer
    if trainer.teacher is None or trainer.teacher.gives < Knowledge.DISTRIBUTION:
        return {}
    source = run.held_out or run.train
    prompts: list[Example] = [source[i] for i in range(min(count, len(source)))]
    written = trainer.writers.student.generate(prompts, Step(0, trainer.args.seed))
    return distance(trainer.model, trainer.teacher, written, trainer.vocabulary)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The training block, which is TrainingArguments, with a run folder and logging at a pace to watch."""
    known = {f.name for f in fields(TrainingArguments) if f.init}
    for key in recipe.training:
        if key not in known:
            message = f"transformers' TrainingArguments have no field {key!r}{_close(key, known)}"
            raise recipe.complaint(f"training.{key}", message)
    defaults: dict[str, Any] = {
        "output_dir": f"runs/{recipe.name}",
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 2,
    }
    try:
        return TrainingArguments(**{**defaults, **recipe.training})
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.complaint("training", str(error).strip().split("\n")[0]) from None


def load_data(data: Data, tokenizer: Any, window: int | None, reserve: int) -> Examples:
    """The examples that a data block describes, cut to the models' window, with room for `reserve` new tokens.

    Raises:
        RecipeError: if the block asks for more than the window; and DataError as `data.load_examples`.
    """
    options = data.model_dump(exclude={"dataset", "split", "name", "seed"})
    if window is not None and data.max_length > window:
        if "max_length" in data.model_fields_set:
            message = f"data.max_length {data.max_length} is longer than the models' window of {window}: lower it"
            raise RecipeError(message, "data.max_length")
        options["max_length"] = window
    if is_playground(data.dataset):
        found = rows(data.dataset, data.split, data.seed, data.limit)
        return examples_from_rows(found, tokenizer, source=data.dataset, reserve=reserve, **options)
    return load_examples(data.dataset, tokenizer, split=data.split, name=data.name, reserve=reserve, **options)


def save_student(run: Run) -> None:
    """The student and its tokenizer in student/, complete or not there at all; adapters merged where asked for."""
    trainer, target = run.trainer, run.folder / "student"
    partial = run.folder / "student.partial"
    if run.recipe.student.merge:
        model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        if trainer.args.should_save:
            model.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.args.should_save:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    trainer.accelerator.wait_for_everyone()


def _teacher(recipe: Recipe, vocabulary: int) -> Any:
    assert recipe.teacher is not None
    name, fields = recipe.teacher
    located = recipe.model_copy(update={"teacher": (name, {**fields, "model": resolve(fields["model"])})})
    located._source, located._lines = recipe._source, recipe._lines
    return located.build("teacher", TEACHERS, vocabulary=vocabulary)


def _claim(folder: Path, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Make the folder this recipe's, and refuse one that belongs to another: nothing computed is overwritten."""
    if arguments.process_index != 0:
        return
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
    file = folder / "recipe.yaml"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        if last_checkpoint(folder) or (folder / "student").exists():
            raise recipe.complaint(
                "training.output_dir",
                f"{folder} holds a run of another recipe; give another training.output_dir, or --restart to delete that run",
            )
        for name in ("teacher_answers.jsonl", "before.json"):
            (folder / name).unlink(missing_ok=True)  # what a run that left no checkpoint computed for its own recipe
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, text)


def _summary(run: Run, seconds: float, metrics: dict[str, float]) -> dict[str, Any]:
    trainer = run.trainer
    model = trainer.accelerator.unwrap_model(trainer.model)
    teacher = getattr(trainer.teacher, "model", None)
    return {
        "recipe": run.recipe.name,
        "folder": str(run.folder),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "tokens": int(trainer.tokens_seen),
        "student_parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "teacher_parameters": None if teacher is None else sum(p.numel() for p in teacher.parameters()),
        "examples": len(run.train),
        "fingerprint": run.train.fingerprint,
        "cut_prompts": run.train.cut_prompts,
        "cut_responses": run.train.cut_responses,
        "skipped": run.train.skipped,
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "device": str(trainer.args.device) if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }


def _remember(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was computed when the run began, also after it was interrupted and resumed."""
    if not path.exists():
        _write(path, json.dumps(compute()))
    return json.loads(path.read_text())


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _close(key: str, known: set[str]) -> str:
    close = nearest(key, sorted(known))
    return close if "did you mean" in close else ""
