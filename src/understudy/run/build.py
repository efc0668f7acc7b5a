"""Build data, models and trainer from a recipe; cheap checks come before expensive ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments, set_seed

from ..batch import Example
from ..data.examples import Examples
from ..generation.response_cache import CachedRollout
from ..generation.stop_tokens import stop_ids
from ..method import Method
from ..models.origin import Origin
from ..models.student import load_student
from ..recipe import Recipe
from ..reward import RewardModel
from ..rollout import Rollout
from ..teacher import Teacher
from ..training.callbacks import LogMetrics
from ..training.display import ShowSamples
from ..training.preparation import check_one_gpu
from ..training.trainer import StudentTrainer
from .arguments import check_optimizer
from .best import Patience, check_best_metric
from .differences import Input
from .folder import RunFolder
from .held_out_metrics import held_out_metrics
from .inputs import run_inputs
from .prepare import prepare, teacher_parts, uses_teacher


@dataclass
class Run:
    """The trainer, models and data of a recipe, ready to train."""

    recipe: Recipe
    trainer: StudentTrainer
    teacher: Teacher | None  # as in the recipe; a method may wrap it for training, as PromptKD does
    tokenizer: Any
    folder: RunFolder
    train: Examples
    held_out: Examples | None
    inputs: list[Input]
    origin: Origin  # of the student
    context_length: int | None  # of prompt and response
    load_student: Callable[[], Any]  # the student once more, as it was before training, whole in this process
    samples: ShowSamples | None = None

    def prompts(self, count: int) -> list[Example]:
        """Up to `count` examples, held out if there are such, whose prompts leave room for a student's response."""
        longest = self.trainer.writers.student.sampling.max_new_tokens
        dataset = (self.held_out or self.train).examples
        room = float("inf") if self.context_length is None else self.context_length - longest
        return list(islice((example for example in dataset if len(example.prompt) <= room), count))


def build(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> Run:
    """Build what a recipe describes: data, student, teacher and trainer.

    Raises:
        RecipeError: with the line, for a mistake in the recipe. The recipe itself is checked first, then files are read
            or downloaded, and weights are loaded last.
    """
    check_processes(recipe, arguments, arguments.world_size)
    method, rollout, sampling, schedule, teacher, reward, configs, train, held_out, corpus = prepare(recipe)

    set_seed(arguments.seed)  # right before random weights of a fresh student and of adapters are drawn
    with recipe.locating("student"):
        dtype = configs.student.dtype  # of the weights on disk
        load = partial(load_student, recipe, configs.student, None if teacher is None else teacher.model_name)
        student = load()
    check_optimizer(recipe, arguments, student)
    origin = Origin.of(dtype, student)
    generator = teacher  # exposure bias is measured with it even if the method does not use it
    if not uses_teacher(method):
        teacher = None
    teacher_models = {} if teacher is None else _teacher_models(recipe, teacher)
    with recipe.locating("reward"):
        if reward is not None:
            reward.load()
    if not sampling.stop_ids:
        live = [] if teacher is None else [part.model for part in teacher.parts().values()]
        sampling = replace(sampling, stop_ids=tuple(stop_ids(configs.tokenizer, student, *live)))
    folder = RunFolder(Path(arguments.output_dir or "."))
    data = {"data.dataset": train, "evaluate.dataset": held_out, "corpus.dataset": corpus}
    models = {"student": student, **teacher_models, **_reward_models(method)}
    parts = {} if teacher is None else teacher_parts(recipe, teacher)
    tokenizers = {key: part.tokenizer for key, part in parts.items() if part.tokenizer is not None}
    tokenizers = {"student.tokenizer": configs.tokenizer, **tokenizers}
    columns = () if teacher is None else teacher.columns
    inputs = run_inputs(recipe, data, models, tokenizers, arguments.world_size, columns)
    trainer = StudentTrainer(
        student,
        teacher,
        method,
        rollout,
        sampling,
        processing_class=configs.tokenizer,
        teacher_rollout=_teacher_rollout(method, rollout, teacher, configs.tokenizer, folder, inputs),
        response_metrics=held_out_metrics(recipe, rollout, sampling, configs.tokenizer, held_out, generator),
        budget=recipe.budget,
        schedule=schedule,
        corpus=() if corpus is None else corpus.examples,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[LogMetrics(folder.metrics)],
        console=console,
    )
    parts = (recipe, trainer, teacher, configs.tokenizer, folder, train, held_out, inputs, origin)
    run = Run(*parts, configs.context_length, load)
    check_best_metric(run)
    _add_callbacks(run, console)
    return run


def check_processes(recipe: Recipe, arguments: TrainingArguments, processes: int) -> None:
    """Refuse training arguments that need another number of processes.

    Raises:
        RecipeError, ValueError: with the remedy.
    """
    if arguments.fsdp and processes == 1:
        message = "training.fsdp needs several processes: start with torchrun, or leave it out"
        raise recipe.error("training.fsdp", message)
    if processes == 1:
        check_one_gpu(arguments)


def _teacher_models(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """The weights of teachers, loaded now, by the keys that name them; a fingerprint where they are elsewhere."""
    models = {}
    for key, part in teacher_parts(recipe, teacher).items():
        with recipe.locating(key):
            weights = part.local_model
            models[key] = part.fingerprint if weights is None else weights
    return models


def _reward_models(method: Method) -> dict[str, Any]:
    """The model of the recipe's reward, by the key that names it."""
    functions = getattr(getattr(method, "reward", None), "functions", {})
    models = [scorer.model for scorer, _ in functions.values() if isinstance(scorer, RewardModel)]
    return {"reward.model": models[0]} if models else {}


def _teacher_rollout(
    method: Method,
    rollout: Rollout,
    teacher: Teacher | None,
    tokenizer: Any,
    folder: RunFolder,
    inputs: Sequence[Input],
) -> Rollout | None:
    """A rollout of the teacher that generates each response once, and then reads it from the run's folder."""
    if "teacher" not in method.authors or teacher is None or teacher.follows_student:
        return None
    weights = "".join(each.value for each in inputs if each.key in ("teacher", "student", "student.tokenizer"))
    engine = teacher.rollout() or (
        rollout if teacher.model is None else rollout.bind(teacher.model, tokenizer, "teacher")
    )
    return CachedRollout(engine, folder.teacher_responses, weights)


def _add_callbacks(run: Run, console: Console | None) -> None:
    """Early stopping and samples, as the recipe's block `evaluate` asks for."""
    block, arguments = run.recipe.evaluate, run.trainer.args
    if block.patience is not None:
        run.trainer.add_callback(Patience(block.patience))
    if examples := run.prompts(block.show):
        every = block.show_every or max(arguments.max_steps if arguments.max_steps > 0 else 500, 5) // 5
        writer, path = run.trainer.writers.student, run.folder.samples
        shows_each = block.show_every is not None
        run.samples = ShowSamples(writer, examples, run.tokenizer, every, path, console, shows_each)
        run.trainer.add_callback(run.samples)
