"""The parts of a run that need no weights: method, rollout, teacher by name, configurations and data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from ..data.examples import Examples
from ..data.load import data_settings, load_data
from ..method import Method
from ..methods import METHODS
from ..models.context_window import context_window
from ..models.load import check_vocabulary, load_tokenizer, loading
from ..models.student import student_config, tokenizer_name
from ..models.vocabulary import vocabulary_size
from ..recipe import Data, Recipe, RecipeError
from ..reward import Reward, RewardModel, function
from ..rollout import Rollout
from ..rollouts import ROLLOUTS
from ..sampling import Sampling, Schedule
from ..teacher import Capability, Teacher
from ..teachers import TEACHERS, check_provides, check_scores_responses, check_tokens
from ..training.collecting import check_rollout
from .held_out_metrics import check_held_out_metrics
from .refusals import Refusals


@dataclass(frozen=True)
class Configs:
    """Tokenizer and configurations, which are read before weights are loaded."""

    tokenizer: Any
    student: Any  # its configuration
    context_length: int | None  # of prompt and response: the shorter one of student and teacher, less a prefix
    teacher_context_length: int | None  # the teacher's, less a prefix


class Prepared(NamedTuple):
    """The parts of a run that need no weights."""

    method: Method
    rollout: Rollout
    sampling: Sampling
    schedule: Schedule
    teacher: Teacher | None
    reward: Reward | None
    configs: Configs
    train: Examples
    held_out: Examples | None
    corpus: Examples | None


def prepare(recipe: Recipe, refusals: Refusals | None = None) -> Prepared:
    """Build what needs no weights, and check that it fits together: the recipe first, then files and hub.

    Where `refusals` are collected, a part that was refused is None, and what needs it is not checked.
    """
    refusals = refusals or Refusals()
    attempt = refusals.attempt
    parts: dict[str, Any] = dict.fromkeys(Prepared._fields)
    with attempt("method"):
        parts["reward"] = _reward(recipe)
    with attempt("method"):
        reward = {} if parts["reward"] is None else {"reward": parts["reward"]}
        parts["method"] = recipe.build("method", METHODS, **reward)
    with attempt("rollout"):
        parts["rollout"] = recipe.build("rollout", ROLLOUTS)
    with attempt("rollout"):
        parts |= {"sampling": recipe.sampling(), "schedule": recipe.schedule()}
    method, sampling = parts["method"], parts["sampling"]
    if None not in (method, parts["rollout"], sampling):
        with attempt("rollout"):
            _check_rollout(recipe, method, parts["rollout"], sampling, parts["schedule"])
    with attempt("teacher"):
        parts["teacher"] = None if recipe.teacher is None else recipe.build("teacher", TEACHERS)
    if method is not None:
        with attempt("teacher"):
            _check_teacher(recipe, method, parts["teacher"])
        with attempt("rollout"):
            _check_authors(recipe, method, parts["rollout"], parts["teacher"])
    parts["configs"] = configs = _check_configs(recipe, parts["teacher"], method, refusals)
    if configs.tokenizer is not None:
        if sampling is not None:
            with attempt("rollout"):
                _check_stop_ids(recipe, sampling, configs.tokenizer)
        parts |= _datasets(recipe, method, sampling, configs, refusals)
        with attempt("data"):
            check_held_out_metrics(recipe, parts["teacher"])
        _check_scored(recipe, method, parts, refusals)
    return Prepared(**parts)


def _check_rollout(recipe: Recipe, method: Method, rollout: Rollout, sampling: Sampling, schedule: Schedule) -> None:
    try:
        check_rollout(method, rollout, sampling, schedule)
    except ValueError as error:
        raise recipe.error("rollout", str(error)) from None


def _check_authors(recipe: Recipe, method: Method, rollout: Rollout | None, teacher: Teacher | None) -> None:
    """Refuse a rollout that cannot generate the teacher's responses where they are needed."""
    if rollout is None or teacher is None or "teacher" in rollout.authors:
        return
    generates = "teacher" in method.authors and teacher.rollout() is None
    if generates or recipe.evaluate.exposure_bias:
        needs = recipe.method[0] if generates else "evaluate.exposure_bias"
        name = recipe.rollout[0]
        message = f"rollout {name} generates the student's responses only, and {needs} needs the teacher's too"
        raise recipe.error("rollout", f"{message}: use generate")


def _check_stop_ids(recipe: Recipe, sampling: Sampling, tokenizer: Any) -> None:
    vocabulary = vocabulary_size(tokenizer)
    if unknown := [i for i in sampling.stop_ids if not 0 <= i < vocabulary]:
        message = f"the stop token {unknown[0]} is none of the tokenizer's {vocabulary} tokens, and would end nothing"
        raise recipe.error(f"rollout.{recipe.rollout[0]}.stop_ids", f"{message}: correct stop_ids")


def uses_teacher(method: Method) -> bool:
    """Does the method need a teacher, to score or to generate?"""
    return bool(method.requires) or "teacher" in method.authors


def _check_teacher(recipe: Recipe, method: Method, teacher: Teacher | None) -> None:
    """Refuse a teacher, whose model is not loaded yet, that does not provide what the method needs."""
    name = recipe.method[0]
    if teacher is None:
        if uses_teacher(method) and recipe.teacher is None:
            message = f"{name} needs a teacher: add a block such as `teacher: {{local: {{model: …}}}}`"
            raise recipe.error("method", message)
        return
    generates = {Capability.MODEL} if "teacher" in method.authors and teacher.rollout() is None else set()
    with recipe.locating("teacher"):
        try:
            if uses_teacher(method):
                check_scores_responses(teacher, method.authors, name)
            check_provides(teacher, method.requires | generates, name)
        except ValueError as error:
            raise RecipeError(str(error)) from None


def _check_scored(recipe: Recipe, method: Method | None, parts: dict[str, Any], refusals: Refusals) -> None:
    """Refuse a dataset of which the teacher cannot score an example."""
    teacher, tokenizer = parts["teacher"], parts["configs"].tokenizer
    if teacher is None or method is None or not method.requires:
        return
    for data, examples in ((recipe.data, parts["train"]), (held_out_data(recipe), parts["held_out"])):
        if examples is not None:
            with refusals.attempt("teacher"):
                _check_data(recipe, teacher, examples, data_settings(data, tokenizer))


def _check_data(recipe: Recipe, teacher: Teacher, examples: Examples, settings: dict[str, Any]) -> None:
    with recipe.locating("teacher"):
        try:
            teacher.check_data(examples, settings)
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from None


def teacher_parts(recipe: Recipe, teacher: Teacher) -> dict[str, Teacher]:
    """The teachers that the recipe's one consists of, or itself, by the keys that name them."""
    assert recipe.teacher is not None
    return {f"teacher.{recipe.teacher[0]}.{key}" if key else "teacher": part for key, part in teacher.parts().items()}


def _check_configs(recipe: Recipe, teacher: Teacher | None, method: Method | None, refusals: Refusals) -> Configs:
    """Load tokenizers and configurations, and check that they fit together."""
    parts = {} if teacher is None else teacher_parts(recipe, teacher)
    tokenizer, config = None, None
    with refusals.attempt("student"), recipe.locating("student"):
        tokenizer = load_tokenizer(tokenizer_name(recipe, None if teacher is None else teacher.tokenizer_name))
    with refusals.attempt("student"), recipe.locating("student"):
        config = student_config(recipe, None if teacher is None else teacher.model_name)
        if tokenizer is not None:
            check_vocabulary(tokenizer, config, "the student has")

    @contextmanager
    def attempt(key: str, topic: str) -> Iterator[None]:
        with refusals.attempt(topic), recipe.locating(key):
            yield

    scores = method is not None and uses_teacher(method)
    configs = [check_tokens(part, tokenizer, scores, partial(attempt, key)) for key, part in parts.items()]
    teachers = [each for each in configs if each is not None]
    prefix = 0 if method is None else method.teacher_prefix_tokens
    own = [] if config is None else [config]
    lengths = [context_window(*(teachers or own)), *(part.context_length for part in parts.values())]
    teacher_window = min(filter(None, lengths), default=None)
    window = min(filter(None, [context_window(*own), teacher_window]), default=None)
    with refusals.attempt("method"):
        if window is not None and window < prefix + 2:
            message = f"a prompt of {prefix} tokens before the texts does not fit into the context window of {window}"
            raise recipe.error("method", f"{message}: lower method.{recipe.method[0]}.prompt_tokens")
    lengths = [None if length is None else length - prefix for length in (window, teacher_window)]
    return Configs(tokenizer, config, *lengths)


def _reward(recipe: Recipe) -> Reward | None:
    """The method's argument `reward`, if the recipe has that block."""
    block = recipe.reward
    if block is None:
        return None
    with recipe.locating("method"):
        parameters = signature(METHODS.get(recipe.method[0])).parameters
    if "reward" not in parameters:
        raise recipe.error("reward", f"{recipe.method[0]} takes no reward; gkd and opd do")
    with recipe.locating("reward"):
        try:
            functions: dict[Any, float] = {function(place): w for place, w in block.functions.items()}
            if block.model is not None:
                with loading("reward model", block.model):
                    functions[RewardModel(block.model, block.label, block.reads)] = block.weight
            return Reward(functions, block.normalize)
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"reward: {error}", "reward") from None


def held_out_data(recipe: Recipe) -> Data:
    """The data block of the held-out dataset: that of the training data with some fields of `evaluate`."""
    block = recipe.evaluate
    changes = {"dataset": block.dataset, "split": block.split, "name": block.name, "limit": block.limit}
    return recipe.data.model_copy(update=changes)


def _check_teacher_prompt(recipe: Recipe, method: Method) -> None:
    """Refuse a prompt for a teacher that the method does not have."""
    for field in ("teacher_prompt", "teacher_system"):
        if getattr(recipe.data, field) is not None and not uses_teacher(method):
            message = f"data.{field} is read by a teacher, and {recipe.method[0]} uses none: leave it out"
            raise recipe.error(f"data.{field}", message)


def _datasets(
    recipe: Recipe, method: Method | None, sampling: Sampling | None, configs: Configs, refusals: Refusals
) -> dict[str, Examples | None]:
    """The training data, and the held-out dataset and corpus if the recipe has them."""
    authors = set() if method is None else method.authors
    reserve = sampling.max_new_tokens if sampling is not None and authors - {"dataset"} else 1
    lengths = (configs.context_length, reserve, configs.teacher_context_length)
    loaded: dict[str, Examples | None] = {"train": None, "held_out": None, "corpus": None}
    if method is not None:
        with refusals.attempt("data"):
            _check_teacher_prompt(recipe, method)
    with refusals.attempt("data"), recipe.locating("data"):
        loaded["train"] = load_data(recipe.data, configs.tokenizer, *lengths)
    if recipe.evaluate.dataset is not None:
        with refusals.attempt("data"), recipe.locating("data"):
            loaded["held_out"] = load_data(held_out_data(recipe), configs.tokenizer, *lengths)
    if recipe.corpus is not None and method is not None:
        with refusals.attempt("data"):
            if not method.uses_corpus:
                raise recipe.error("corpus", f"{recipe.method[0]} reads no corpus; dpkd does")
            texts = recipe.corpus.model_copy(update={"text_prompt": 1})
            with recipe.locating("corpus"):
                loaded["corpus"] = load_data(texts, configs.tokenizer, configs.context_length, 1)
    if "dataset" in authors:
        for examples in filter(None, (loaded["train"], loaded["held_out"])):
            with refusals.attempt("data"):
                examples.require_responses(recipe.method[0])
    return loaded
