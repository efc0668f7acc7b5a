"""Build everything that a recipe describes. Mistakes are looked for in the order of what it costs to find them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from .. import metrics
from ..data.examples import Examples
from ..data.load import load_data
from ..evaluation.evaluate import evaluate
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
from ..playground.names import resolve
from ..recipe import Recipe, RecipeError
from ..reward import Reward, RewardModel, function
from ..rollouts import ROLLOUTS
from ..scores import Knowledge
from ..teacher import Teacher
from ..teachers import TEACHERS
from ..training.callbacks import ShowSamples, WriteMetrics
from ..training.trainer import DistillationTrainer
from .folder import RunFolder


@dataclass
class Run:
    """Everything that a recipe describes, ready to train."""

    recipe: Recipe
    trainer: DistillationTrainer
    teacher: Teacher | None  # as the recipe describes it; a method may train with it in a changed form
    tokenizer: Any
    folder: RunFolder
    train: Examples
    held_out: Examples | None


@dataclass(frozen=True)
class _Names:
    """What is known of the models before their weights are loaded."""

    tokenizer: Any
    config: Any  # the student's
    teacher: str | None  # the name or folder of the teacher's model
    context_length: int | None  # of student and teacher both


def build(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> Run:
    """Build what a recipe describes: data, student, teacher and trainer.

    Raises:
        RecipeError: naming the line, for what is wrong with the recipe; files are read or fetched after the recipe's
            own mistakes are ruled out, and weights are loaded last.
    """
    method: Method = recipe.build("method", METHODS, **_reward(recipe))
    rollout = recipe.build("rollout", ROLLOUTS)
    needs_teacher = method.needs > Knowledge.NOTHING or "teacher" in method.authors
    if needs_teacher and recipe.teacher is None:
        message = f"{recipe.method[0]} needs a teacher: add a block such as `teacher: {{local: {{model: …}}}}`"
        raise recipe.complaint("method", message)
    if recipe.teacher is not None:
        recipe.check("teacher", TEACHERS, vocabulary=0)

    # From here on files are read, or fetched from the hub; weights come last.
    names = _check_names(recipe, needs_teacher)
    context = None if names.context_length is None else names.context_length - method.context
    generates = bool(method.authors - {"dataset"})
    train, held_out = _datasets(recipe, method, names.tokenizer, context, rollout.max_new_tokens if generates else 1)

    set_seed(arguments.seed)  # right before the only things here that are drawn: fresh weights and adapters
    with recipe.locating("student"):
        student = load_student(recipe, names.config, names.teacher)
    teacher = _teacher(recipe, len(names.tokenizer)) if needs_teacher else None
    if rollout.stop_ids is None:
        rollout.stop_ids = all_stop_ids(names.tokenizer, student, getattr(teacher, "model", None))
    folder = RunFolder(Path(arguments.output_dir or "."))
    trainer = DistillationTrainer(
        student,
        teacher,
        method,
        rollout,
        processing_class=names.tokenizer,
        teacher_writer=_teacher_rollout(method, rollout, teacher, names.tokenizer, folder),
        judge=_response_metrics(recipe, rollout, names.tokenizer, held_out) if recipe.evaluate.metrics else None,
        budget=recipe.budget,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[WriteMetrics(folder.metrics)],
    )
    run = Run(recipe, trainer, teacher, names.tokenizer, folder, train, held_out)
    _add_callbacks(run, rollout, console)
    return run


def _check_names(recipe: Recipe, needs_teacher: bool) -> _Names:
    """Check that tokenizers and configurations fit together."""
    teacher = teacher_name(recipe)
    with recipe.locating("student"):
        tokenizer = load_tokenizer(tokenizer_name(recipe))
        config = student_config(recipe, teacher)
        check_vocabulary(tokenizer, config, "the student has")
    configs = [config]
    if teacher is not None:
        with recipe.locating("teacher"):
            check_tokenizers(tokenizer, load_tokenizer(teacher))
            if needs_teacher:
                configs.append(load_config(teacher))
                check_vocabulary(tokenizer, configs[-1], "the teacher has")
    return _Names(tokenizer, config, teacher, window_of(*configs))


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


def _datasets(
    recipe: Recipe, method: Method, tokenizer: Any, context_length: int | None, reserve: int
) -> tuple[Examples, Examples | None]:
    """The training data and, where the recipe names one, the held-out dataset."""
    block = recipe.evaluate
    changes = {"dataset": block.dataset, "split": block.split, "name": block.name, "limit": block.limit}
    with recipe.locating("data"):
        train = load_data(recipe.data, tokenizer, context_length, reserve)
        held_out = None
        if block.dataset is not None:
            held_out = load_data(recipe.data.model_copy(update=changes), tokenizer, context_length, reserve)
    if recipe.corpus is not None:
        if method.corpus is None:
            raise recipe.complaint("corpus", f"{recipe.method[0]} reads no corpus; dpkd does")
        texts = recipe.corpus.model_copy(update={"text_prompt": 1})
        with recipe.locating("corpus"):
            method.corpus = load_data(texts, tokenizer, context_length, 1).examples
    if "dataset" in method.authors:
        for examples in filter(None, (train, held_out)):
            examples.require_responses(recipe.method[0])
    return train, held_out


def _teacher(recipe: Recipe, vocabulary: int) -> Any:
    assert recipe.teacher is not None
    name, fields = recipe.teacher
    model = fields.get("model", name)
    resolved = recipe.model_copy(update={"teacher": (name, {**fields, "model": resolve(model)})})
    with recipe.locating("teacher"), loading("model", model):
        return resolved.build("teacher", TEACHERS, vocabulary=vocabulary)


def _teacher_rollout(method: Method, rollout: Any, teacher: Any, tokenizer: Any, folder: RunFolder) -> Any:
    """A rollout for the teacher's responses, each of which is generated once and read from the run's folder after."""
    if "teacher" not in method.authors or teacher is None:
        return None
    generating = copy.copy(rollout).follow(teacher.model, tokenizer, "teacher")
    return KeptAnswers(generating, folder.teacher_responses)


def _response_metrics(
    recipe: Recipe, rollout: Any, tokenizer: Any, held_out: Examples | None
) -> Callable[[Any], dict[str, float]]:
    """A function from the student model to the metrics of its greedy responses to the held-out prompts."""
    names = recipe.evaluate.metrics
    if held_out is None:
        raise recipe.complaint("evaluate.metrics", "metrics need held-out data: add evaluate.dataset")
    with recipe.locating("evaluate.metrics"):
        metrics.check(names)
    greedy = copy.copy(rollout)
    greedy.temperature, greedy.responses = 0.0, 1
    skipped = ("seconds", "tokens_per", "examples")

    def response_metrics(student: Any) -> dict[str, float]:
        values = evaluate(student, tokenizer, held_out, greedy, metrics=names).metrics
        return {name: value for name, value in values.items() if not name.startswith(skipped)}

    return response_metrics


def _add_callbacks(run: Run, rollout: Any, console: Console | None) -> None:
    """Early stopping and samples, as the recipe's block `evaluate` asks for."""
    block, arguments = run.recipe.evaluate, run.trainer.args
    if block.patience is not None:
        run.trainer.add_callback(EarlyStoppingCallback(block.patience))
    if block.show:
        every = block.show_every or max(arguments.max_steps if arguments.max_steps > 0 else 500, 5) // 5
        dataset = run.held_out or run.train
        examples = [dataset[i] for i in range(min(block.show, len(dataset)))]
        samples = ShowSamples(rollout, examples, run.tokenizer, every, run.folder.samples, console)
        run.trainer.add_callback(samples)
