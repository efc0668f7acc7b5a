"""A run: what a recipe describes, built, checked before anything is computed, trained and saved.

A run lives in one folder, `training.output_dir`:

    recipe.yaml     the resolved recipe          metrics.jsonl   every log line
    .understudy     a mark: the rest is a run's  before.json     what it began with
    checkpoint-N/   to resume from               samples.jsonl   answers shown as the student learned
    student/        the result                   run.json        versions, hardware, counts, seconds, final metrics

The same command again resumes an interrupted run from its last complete checkpoint.
"""

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich import get_console
from rich.console import Console
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from .. import metrics
from ..batch import Example
from ..data.examples import Examples, examples_from_rows, load_examples
from ..evaluation.evaluate import distance, evaluate
from ..generation.response_cache import KeptAnswers
from ..method import Method
from ..methods import METHODS
from ..models.student import (
    all_stop_ids,
    check_tokenizers,
    check_vocabulary,
    load_config,
    load_student,
    load_tokenizer,
    loading,
    student_config,
    teacher_name,
    tokenizer_name,
    window_of,
)
from ..playground.names import is_playground, resolve, rows
from ..recipe import Data, Recipe, RecipeError, checked
from ..registry import did_you_mean
from ..reward import Reward, RewardModel, function
from ..rollouts import ROLLOUTS
from ..scores import Knowledge
from ..step import Step
from ..teacher import Teacher
from ..teachers import TEACHERS
from ..training.callbacks import ShowSamples, StopOnInterrupt, WriteMetrics
from ..training.trainer import DistillationTrainer, last_checkpoint
from .folder import check_free, check_unchanged, claim, write
from .summary import summarize

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after saving a checkpoint."""


@dataclass
class Run:
    """Everything that a recipe describes, ready to train."""

    recipe: Recipe
    trainer: DistillationTrainer
    teacher: Teacher | None  # as the recipe describes it; a method may train with it in a changed form
    tokenizer: Any
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
    folder = Path(arguments.output_dir or ".")
    with arguments.main_process_first(local=False):
        check_free(folder, recipe, restart)
    if not restart and (folder / "run.json").exists() and (folder / "student").exists():
        console.print(f"{folder} is finished already; --restart runs it again", soft_wrap=True)
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))

    run = build(recipe, arguments, console)
    if not restart:
        check_unchanged(folder, recipe, run.train)
    run.trainer.accelerator.wait_for_everyone()  # nothing is deleted before every process has found all it needs
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            claim(folder, recipe, restart)
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        console.print(f"resuming from {checkpoint}", soft_wrap=True)
        before = json.loads((folder / "before.json").read_text(encoding="utf-8"))["own_samples"]
    else:
        before = own_samples(run)
        began = {"fingerprint": run.train.fingerprint, "own_samples": before}
        write(folder / "before.json", json.dumps(began), arguments)
    watch = StopOnInterrupt()
    run.trainer.add_callback(watch)
    start, cpu_start = time.perf_counter(), time.process_time()
    run.trainer.train(resume_from_checkpoint=checkpoint)
    if watch.interrupted:
        raise Interrupted(f"stopped after step {run.trainer.state.global_step}; the same command goes on from there")
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    found = run.trainer.evaluate() if run.held_out is not None else {}
    summary = summarize(run, seconds, found) | {"own_samples": {"before": before, "after": own_samples(run)}}
    save_student(run)
    if arguments.process_index == 0:
        run.trainer.method.export(folder)
    write(folder / "run.json", json.dumps(summary, indent=2), arguments)
    return summary


def build(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> Run:
    """Build what a recipe describes. Mistakes are looked for in the order of what finding them costs."""
    method: Method = recipe.build("method", METHODS, **_reward(recipe))
    rollout = recipe.build("rollout", ROLLOUTS)
    wanted = method.needs > Knowledge.NOTHING or "teacher" in method.authors
    if wanted and recipe.teacher is None:
        message = f"{recipe.method[0]} needs a teacher: add a block such as `teacher: {{local: {{model: …}}}}`"
        raise recipe.complaint("method", message)
    if recipe.teacher is not None:
        recipe.check("teacher", TEACHERS, vocabulary=0)

    # From here on files are read, or fetched from the hub; weights come last.
    name = teacher_name(recipe)
    with recipe.locating("student"):
        tokenizer = load_tokenizer(tokenizer_name(recipe))
        config = student_config(recipe, name)
        check_vocabulary(tokenizer, config, "the student has")
    configs = [config]
    if name is not None:
        with recipe.locating("teacher"):
            check_tokenizers(tokenizer, load_tokenizer(name))
            if wanted:
                configs.append(load_config(name))
                check_vocabulary(tokenizer, configs[-1], "the teacher has")
    writes = method.authors - {"dataset"}
    window = window_of(*configs)
    window = None if window is None else window - method.context
    train, held_out = _datasets(recipe, method, tokenizer, window, rollout.max_new_tokens if writes else 1)

    set_seed(arguments.seed)  # right before the only things here that are drawn: fresh weights and adapters
    with recipe.locating("student"):
        student = load_student(recipe, config, name)
    teacher = _teacher(recipe, len(tokenizer)) if wanted else None
    if rollout.stop_ids is None:
        rollout.stop_ids = all_stop_ids(tokenizer, student, getattr(teacher, "model", None))
    folder = Path(arguments.output_dir or ".")
    teacher_writer = None
    if "teacher" in writes and teacher is not None:
        writer = copy.copy(rollout).follow(teacher.model, tokenizer, "teacher")
        teacher_writer = KeptAnswers(writer, folder / "teacher_answers.jsonl")
    trainer = DistillationTrainer(
        student,
        teacher,
        method,
        rollout,
        processing_class=tokenizer,
        teacher_writer=teacher_writer,
        judge=_judge(recipe, rollout, tokenizer, held_out) if recipe.evaluate.metrics else None,
        budget=recipe.budget,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[WriteMetrics(folder / "metrics.jsonl")],
    )
    shown = recipe.evaluate
    if shown.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(shown.patience))
    if shown.show:
        every = shown.show_every or max(arguments.max_steps if arguments.max_steps > 0 else 500, 5) // 5
        source = held_out or train
        examples = [source[i] for i in range(min(shown.show, len(source)))]
        trainer.add_callback(ShowSamples(rollout, examples, tokenizer, every, folder / "samples.jsonl", console))
    return Run(recipe, trainer, teacher, tokenizer, folder, train, held_out)


def _reward(recipe: Recipe) -> dict[str, Reward]:
    """The method's argument `reward`, if the recipe has that block."""
    block = recipe.reward
    if block is None:
        return {}
    name = recipe.method[0]
    if name in METHODS.names() and "reward" not in signature(METHODS.get(name)).parameters:
        raise recipe.complaint("reward", f"{name} takes no reward; gkd does")
    with recipe.locating("reward"):
        try:
            functions: dict[Any, float] = {function(place): w for place, w in block.functions.items()}
            if block.model is not None:
                with loading("reward model", block.model):
                    functions[RewardModel(block.model, block.label, block.reads)] = block.weight
            return {"reward": Reward(functions, block.normalize)}
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"reward: {error}", "reward") from None


def _judge(
    recipe: Recipe, rollout: Any, tokenizer: Any, held_out: Examples | None
) -> Callable[[Any], dict[str, float]]:
    """What a student's greedy answers to the held-out prompts come to, as numbers."""
    names = recipe.evaluate.metrics
    if held_out is None:
        raise recipe.complaint("evaluate.metrics", "metrics need held-out data: add evaluate.dataset")
    with recipe.locating("evaluate.metrics"):
        metrics.check(names)
    greedy = copy.copy(rollout)
    greedy.temperature, greedy.responses = 0.0, 1

    def judge(student: Any) -> dict[str, float]:
        found = evaluate(student, tokenizer, held_out, greedy, metrics=names).metrics
        return {
            name: value for name, value in found.items() if not name.startswith(("seconds", "tokens_per", "examples"))
        }

    return judge


def own_samples(run: Run, count: int = 64) -> dict[str, float]:
    """How far the student is from the teacher on its own answers to a few prompts, drawn alike whenever asked.

    Returns the means of `scores.compare` over the answers' tokens; nothing where no teacher's distribution is known.
    """
    trainer, teacher = run.trainer, run.teacher
    if teacher is None or teacher.gives < Knowledge.DISTRIBUTION:
        return {}
    source = run.held_out or run.train
    prompts: list[Example] = [source[i] for i in range(min(count, len(source)))]
    written = trainer.writers.student.generate(prompts, Step(0, trainer.args.seed))
    assert isinstance(trainer.model, nn.Module)
    return distance(trainer.model, teacher, written, trainer.vocabulary)


def gains_from_bf16() -> bool:
    """Has this machine instructions that multiply in bfloat16: a GPU's tensor cores, or a CPU's AVX-512, AMX or SVE?"""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    having: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(having.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The training block, which is TrainingArguments, with a run folder and logging at a pace to watch."""
    values: dict[str, Any] = {
        "output_dir": f"runs/{recipe.name}",
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 2,
    }
    known, hints = {f.name for f in fields(TrainingArguments) if f.init}, get_type_hints(TrainingArguments)
    for key, value in recipe.training.items():
        if key not in known:
            message = f'transformers\' TrainingArguments have no field "{key}"{did_you_mean(key, known)}'
            raise recipe.complaint(f"training.{key}", message)
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if (key, value) == ("bf16", "auto"):
            value = gains_from_bf16()
        hint: Any = hints[key]
        with recipe.locating(f"training.{key}"):  # the types that TrainingArguments themselves don't check
            values[key] = checked(value, hint, f"training.{key}") if hint in (int, float, bool) else value
        if key in _AT_LEAST_ONE and int(value) < 1:
            raise recipe.complaint(f"training.{key}", f"training.{key} is {value}, and 1 is the least")
    if values.get("eval_strategy", "no") not in ("no", False) and recipe.evaluate.dataset is None:
        message = "evaluating while training needs held-out data: add evaluate.dataset, or leave eval_strategy out"
        raise recipe.complaint("training.eval_strategy", message)
    try:
        made = TrainingArguments(**values)
        for callback in get_reporting_integration_callbacks(made.report_to):
            callback()  # fails where the logger's package is not installed
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        key = next((key for key in recipe.training if key in str(error)), "")
        key = key or next((key for key, value in recipe.training.items() if f"{value} " in f"{error} "), "")
        message = str(error).strip().split("\n")[0]
        raise recipe.complaint(f"training.{key}".rstrip("."), f"training.{key}: {message}".replace(".:", ":")) from None
    return made


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


def _datasets(
    recipe: Recipe, method: Method, tokenizer: Any, window: int | None, reserve: int
) -> tuple[Examples, Examples | None]:
    """What is trained on and, where the recipe names it, what is held out."""
    look = recipe.evaluate
    other = {"dataset": look.dataset, "split": look.split, "name": look.name, "limit": look.limit}
    with recipe.locating("data"):
        train = load_data(recipe.data, tokenizer, window, reserve)
        held_out = None
        if look.dataset is not None:
            held_out = load_data(recipe.data.model_copy(update=other), tokenizer, window, reserve)
    if recipe.corpus is not None:
        if method.corpus is None:
            raise recipe.complaint("corpus", f"{recipe.method[0]} reads no corpus; dpkd does")
        texts = recipe.corpus.model_copy(update={"text_prompt": 1})
        with recipe.locating("corpus"):
            method.corpus = load_data(texts, tokenizer, window, 1).examples
    if "dataset" in method.authors:
        for examples in filter(None, (train, held_out)):
            examples.require_responses(recipe.method[0])
    return train, held_out


def save_student(run: Run) -> None:
    """The student and its tokenizer in student/, complete or not there at all; adapters merged where asked for."""
    trainer, target = run.trainer, run.folder / "student"
    partial = run.folder / "student.partial"
    if run.recipe.student.merge:
        model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        if trainer.args.should_save:
            model.save_pretrained(partial)
            run.tokenizer.save_pretrained(partial)
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
    place = fields.get("model", name)
    located = recipe.model_copy(update={"teacher": (name, {**fields, "model": resolve(place)})})
    with recipe.locating("teacher"), loading("model", place):
        return located.build("teacher", TEACHERS, vocabulary=vocabulary)
