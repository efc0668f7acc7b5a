"""Build data, models and trainer from a recipe; cheap checks come before expensive ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from .. import metrics
from ..batch import Example
from ..data.examples import Examples
from ..data.load import load_data
from ..evaluation.evaluate import evaluate
from ..generation.response_cache import CachedRollout
from ..generation.stop_tokens import stop_ids
from ..method import Method
from ..methods import METHODS
from ..models.context_window import context_window
from ..models.load import check_tokenizers, check_vocabulary, load_config, load_tokenizer, loading
from ..models.origin import Origin
from ..models.student import load_student, student_config, tokenizer_name
from ..recipe import Recipe, RecipeError
from ..reward import Reward, RewardModel, function
from ..rollout import Rollout
from ..rollouts import ROLLOUTS
from ..sampling import Sampling
from ..teacher import Capability, Teacher
from ..teachers import TEACHERS, check_provides
from ..training.callbacks import LogMetrics
from ..training.display import ShowSamples
from ..training.trainer import StudentTrainer
from .differences import Input
from .folder import RunFolder
from .inputs import run_inputs


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
    samples: ShowSamples | None = None

    def prompts(self, count: int) -> list[Example]:
        """Up to `count` examples, held out if there are such, whose prompts leave room for a student's response."""
        longest = self.trainer.writers.student.sampling.max_new_tokens
        dataset = (self.held_out or self.train).examples
        room = float("inf") if self.context_length is None else self.context_length - longest
        return list(islice((example for example in dataset if len(example.prompt) <= room), count))


@dataclass(frozen=True)
class Configs:
    """Tokenizer and configurations, which are read before weights are loaded."""

    tokenizer: Any
    student: Any  # its configuration
    context_length: int | None  # of prompt and response: the shorter one of student and teacher, less a prefix


class Prepared(NamedTuple):
    """The parts of a run that need no weights."""

    method: Method
    rollout: Rollout
    sampling: Sampling
    teacher: Teacher | None
    reward: Reward | None
    configs: Configs
    train: Examples
    held_out: Examples | None
    corpus: Examples | None


def build(recipe: Recipe, arguments: TrainingArguments, console: Console | None = None) -> Run:
    """Build what a recipe describes: data, student, teacher and trainer.

    Raises:
        RecipeError: with the line, for a mistake in the recipe. The recipe itself is checked first, then files are read
            or downloaded, and weights are loaded last.
    """
    method, rollout, sampling, teacher, reward, configs, train, held_out, corpus = prepare(recipe)

    set_seed(arguments.seed)  # right before random weights of a fresh student and of adapters are drawn
    with recipe.locating("student"):
        dtype = configs.student.dtype  # of the weights on disk
        student = load_student(recipe, configs.student, None if teacher is None else teacher.model_name)
    origin = Origin.of(dtype, student)
    if not uses_teacher(method):
        teacher = None
    with recipe.locating("teacher"):
        teacher_model = None if teacher is None else teacher.model  # loaded now
    with recipe.locating("reward"):
        if reward is not None:
            reward.load()
    if not sampling.stop_ids:
        sampling = replace(sampling, stop_ids=tuple(stop_ids(configs.tokenizer, student, teacher_model)))
    folder = RunFolder(Path(arguments.output_dir or "."))
    data = {"data.dataset": train, "evaluate.dataset": held_out, "corpus.dataset": corpus}
    models = {"student": student, "teacher": teacher_model, **_reward_models(method)}
    inputs = run_inputs(recipe, data, models, configs.tokenizer, arguments.world_size)
    trainer = StudentTrainer(
        student,
        teacher,
        method,
        rollout,
        sampling,
        processing_class=configs.tokenizer,
        teacher_rollout=_teacher_rollout(method, rollout, teacher, configs.tokenizer, folder, inputs),
        response_metrics=_response_metrics(recipe, rollout, sampling, configs.tokenizer, held_out),
        budget=recipe.budget,
        corpus=() if corpus is None else corpus.examples,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[LogMetrics(folder.metrics)],
        console=console,
    )
    parts = (recipe, trainer, teacher, configs.tokenizer, folder, train, held_out, inputs, origin)
    run = Run(*parts, configs.context_length)
    _add_callbacks(run, console)
    return run


def prepare(recipe: Recipe) -> Prepared:
    """Build what needs no weights, and check that it fits together: the recipe first, then files and hub."""
    reward = _reward(recipe)
    method: Method = recipe.build("method", METHODS, **({} if reward is None else {"reward": reward}))
    rollout, sampling = recipe.build("rollout", ROLLOUTS), recipe.sampling()
    try:
        method.check_sampling(sampling)
    except ValueError as error:
        raise recipe.error("rollout", str(error)) from None
    teacher = _teacher(recipe, method)
    configs = _check_configs(recipe, teacher, method)
    reserve = sampling.max_new_tokens if method.authors - {"dataset"} else 1
    train, held_out, corpus = _datasets(recipe, method, configs.tokenizer, configs.context_length, reserve)
    return Prepared(method, rollout, sampling, teacher, reward, configs, train, held_out, corpus)


def uses_teacher(method: Method) -> bool:
    """Does the method need a teacher, to score or to generate?"""
    return bool(method.requires) or "teacher" in method.authors


def _teacher(recipe: Recipe, method: Method) -> Teacher | None:
    """The recipe's teacher, whose model is not loaded yet; refused where it does not provide what the method needs."""
    name = recipe.method[0]
    if recipe.teacher is None:
        if uses_teacher(method):
            message = f"{name} needs a teacher: add a block such as `teacher: {{local: {{model: …}}}}`"
            raise recipe.error("method", message)
        return None
    teacher: Teacher = recipe.build("teacher", TEACHERS)
    generates = {Capability.MODEL} if "teacher" in method.authors else set()
    with recipe.locating("teacher"):
        try:
            check_provides(teacher, method.requires | generates, name)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    return teacher


def _check_configs(recipe: Recipe, teacher: Teacher | None, method: Method) -> Configs:
    """Load tokenizers and configurations, and check that they fit together."""
    name = None if teacher is None else teacher.tokenizer_name
    with recipe.locating("student"):
        tokenizer = load_tokenizer(tokenizer_name(recipe, name))
        config = student_config(recipe, None if teacher is None else teacher.model_name)
        check_vocabulary(tokenizer, config, "the student has")
    configs = [config]
    with recipe.locating("teacher"):
        if name is not None:
            check_tokenizers(tokenizer, load_tokenizer(name))
        if teacher is not None and teacher.model_name is not None and uses_teacher(method):
            configs.append(load_config(teacher.model_name))
            check_vocabulary(tokenizer, configs[-1], "the teacher has")
    window = context_window(*configs)
    return Configs(tokenizer, config, None if window is None else window - method.teacher_prefix_tokens)


def _reward(recipe: Recipe) -> Reward | None:
    """The method's argument `reward`, if the recipe has that block."""
    block = recipe.reward
    if block is None:
        return None
    with recipe.locating("method"):
        parameters = signature(METHODS.get(recipe.method[0])).parameters
    if "reward" not in parameters:
        raise recipe.error("reward", f"{recipe.method[0]} takes no reward; gkd does")
    with recipe.locating("reward"):
        try:
            functions: dict[Any, float] = {function(place): w for place, w in block.functions.items()}
            if block.model is not None:
                with loading("reward model", block.model):
                    functions[RewardModel(block.model, block.label, block.reads)] = block.weight
            return Reward(functions, block.normalize)
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"reward: {error}", "reward") from None


def _reward_models(method: Method) -> dict[str, Any]:
    """The model of the recipe's reward, by the key that names it."""
    functions = getattr(getattr(method, "reward", None), "functions", {})
    models = [scorer.model for scorer, _ in functions.values() if isinstance(scorer, RewardModel)]
    return {"reward.model": models[0]} if models else {}


def _datasets(
    recipe: Recipe, method: Method, tokenizer: Any, context_length: int | None, reserve: int
) -> tuple[Examples, Examples | None, Examples | None]:
    """The training data, and the held-out dataset and corpus if the recipe has them."""
    block = recipe.evaluate
    changes = {"dataset": block.dataset, "split": block.split, "name": block.name, "limit": block.limit}
    with recipe.locating("data"):
        train = load_data(recipe.data, tokenizer, context_length, reserve)
        held_out = None
        if block.dataset is not None:
            held_out = load_data(recipe.data.model_copy(update=changes), tokenizer, context_length, reserve)
    corpus = None
    if recipe.corpus is not None:
        if not method.uses_corpus:
            raise recipe.error("corpus", f"{recipe.method[0]} reads no corpus; dpkd does")
        texts = recipe.corpus.model_copy(update={"text_prompt": 1})
        with recipe.locating("corpus"):
            corpus = load_data(texts, tokenizer, context_length, 1)
    if "dataset" in method.authors:
        for examples in filter(None, (train, held_out)):
            examples.require_responses(recipe.method[0])
    return train, held_out, corpus


def _teacher_rollout(
    method: Method,
    rollout: Rollout,
    teacher: Teacher | None,
    tokenizer: Any,
    folder: RunFolder,
    inputs: Sequence[Input],
) -> Rollout | None:
    """A rollout of the teacher that generates each response once, and then reads it from the run's folder."""
    if "teacher" not in method.authors or teacher is None:
        return None
    weights = "".join(each.value for each in inputs if each.key in ("teacher", "student.tokenizer"))
    return CachedRollout(rollout.bind(teacher.model, tokenizer, "teacher"), folder.teacher_responses, weights)


def _response_metrics(
    recipe: Recipe, rollout: Rollout, sampling: Sampling, tokenizer: Any, held_out: Examples | None
) -> Callable[[Any], dict[str, float]] | None:
    """A function from the student to the metrics of its greedy responses to the held-out prompts, if there are any.

    Their length is `greedy_response_length`, beside that of the responses on which the loss is measured.
    """
    names = recipe.evaluate.metrics
    if not names:
        return None
    if held_out is None:
        raise recipe.error("evaluate.metrics", "metrics need held-out data: add evaluate.dataset")
    with recipe.locating("evaluate.metrics"):
        metrics.check(names)
    greedy = replace(sampling, temperature=0.0, n=1)
    skipped = ("seconds", "tokens_per", "examples")

    def response_metrics(student: Any) -> dict[str, float]:
        values = evaluate(student, tokenizer, held_out, rollout, greedy, metrics=names).metrics
        renamed = {name: f"greedy_{name}" for name in ("response_length", "truncated")}
        return {renamed.get(k, k): value for k, value in values.items() if not k.startswith(skipped)}

    return response_metrics


def _add_callbacks(run: Run, console: Console | None) -> None:
    """Early stopping and samples, as the recipe's block `evaluate` asks for."""
    block, arguments = run.recipe.evaluate, run.trainer.args
    if block.patience is not None:
        run.trainer.add_callback(EarlyStoppingCallback(block.patience))
    if examples := run.prompts(block.show):
        every = block.show_every or max(arguments.max_steps if arguments.max_steps > 0 else 500, 5) // 5
        writer, path = run.trainer.writers.student, run.folder.samples
        shows_each = block.show_every is not None
        run.samples = ShowSamples(writer, examples, run.tokenizer, every, path, console, shows_each)
        run.trainer.add_callback(run.samples)
