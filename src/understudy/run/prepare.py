"""The parts of a run that need no weights: method, rollout, teacher by name, configurations and data."""

from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

from ..data.examples import Examples
from ..data.load import data_settings, load_data
from ..method import Method
from ..methods import METHODS
from ..models.context_window import context_window
from ..models.load import check_tokenizers, check_vocabulary, load_config, load_tokenizer, loading
from ..models.student import student_config, tokenizer_name
from ..models.vocabulary import vocabulary_size
from ..recipe import Data, Recipe, RecipeError
from ..reward import Reward, RewardModel, function
from ..rollout import Rollout
from ..rollouts import ROLLOUTS
from ..sampling import Sampling, Schedule
from ..teacher import Capability, Teacher, TeacherError
from ..teachers import TEACHERS, check_provides, check_scores_responses
from ..training.collecting import check_rollout


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
    schedule: Schedule
    teacher: Teacher | None
    reward: Reward | None
    configs: Configs
    train: Examples
    held_out: Examples | None
    corpus: Examples | None


def prepare(recipe: Recipe) -> Prepared:
    """Build what needs no weights, and check that it fits together: the recipe first, then files and hub."""
    reward = _reward(recipe)
    method: Method = recipe.build("method", METHODS, **({} if reward is None else {"reward": reward}))
    rollout, sampling, schedule = recipe.build("rollout", ROLLOUTS), recipe.sampling(), recipe.schedule()
    try:
        check_rollout(method, rollout, sampling, schedule)
    except ValueError as error:
        raise recipe.error("rollout", str(error)) from None
    teacher = _teacher(recipe, method)
    configs = _check_configs(recipe, teacher, method)
    vocabulary = vocabulary_size(configs.tokenizer)
    if unknown := [i for i in sampling.stop_ids if not 0 <= i < vocabulary]:
        message = f"the stop token {unknown[0]} is none of the tokenizer's {vocabulary} tokens, and would end nothing"
        raise recipe.error(f"rollout.{recipe.rollout[0]}.stop_ids", f"{message}: correct stop_ids")
    reserve = sampling.max_new_tokens if method.authors - {"dataset"} else 1
    train, held_out, corpus = _datasets(recipe, method, configs.tokenizer, configs.context_length, reserve)
    if teacher is not None and method.requires:
        for data, examples in ((recipe.data, train), (held_out_data(recipe), held_out)):
            if examples is not None:
                _check_data(recipe, teacher, examples, data_settings(data, configs.tokenizer))
    return Prepared(method, rollout, sampling, schedule, teacher, reward, configs, train, held_out, corpus)


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
    generates = {Capability.MODEL} if "teacher" in method.authors and teacher.rollout() is None else set()
    with recipe.locating("teacher"):
        try:
            if uses_teacher(method):
                check_scores_responses(teacher, method.authors, name)
            check_provides(teacher, method.requires | generates, name)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    return teacher


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


def _check_configs(recipe: Recipe, teacher: Teacher | None, method: Method) -> Configs:
    """Load tokenizers and configurations, and check that they fit together."""
    name = None if teacher is None else teacher.tokenizer_name
    parts = {} if teacher is None else teacher_parts(recipe, teacher)
    with recipe.locating("student"):
        tokenizer = load_tokenizer(tokenizer_name(recipe, name))
        config = student_config(recipe, None if teacher is None else teacher.model_name)
        check_vocabulary(tokenizer, config, "the student has")
    configs = [config]
    for key, part in parts.items():
        with recipe.locating(key):
            if part.tokenizer_name is not None:
                check_tokenizers(tokenizer, load_tokenizer(part.tokenizer_name))
            if part.model_name is not None and uses_teacher(method):
                configs.append(load_config(part.model_name))
                check_vocabulary(tokenizer, configs[-1], "the teacher has")
            if uses_teacher(method):
                _setup(part, tokenizer)
    lengths = [context_window(*configs), *(part.context_length for part in parts.values())]
    window, prefix = min(filter(None, lengths), default=None), method.teacher_prefix_tokens
    if window is not None and window < prefix + 2:
        message = f"a prompt of {prefix} tokens before the texts does not fit into the context window of {window}"
        raise recipe.error("method", f"{message}: lower method.{recipe.method[0]}.prompt_tokens")
    return Configs(tokenizer, config, None if window is None else window - prefix)


def _setup(teacher: Teacher, tokenizer: Any) -> None:
    try:
        teacher.setup(tokenizer)
    except (ValueError, TeacherError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from None


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


def _datasets(
    recipe: Recipe, method: Method, tokenizer: Any, context_length: int | None, reserve: int
) -> tuple[Examples, Examples | None, Examples | None]:
    """The training data, and the held-out dataset and corpus if the recipe has them."""
    with recipe.locating("data"):
        train = load_data(recipe.data, tokenizer, context_length, reserve)
        held_out = None
        if recipe.evaluate.dataset is not None:
            held_out = load_data(held_out_data(recipe), tokenizer, context_length, reserve)
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
