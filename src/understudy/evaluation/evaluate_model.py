"""Load a model, data and a teacher by name and evaluate the model; used by every command that evaluates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import Progress
from transformers import PreTrainedConfig

from ..data.examples import Examples
from ..data.load import load_data
from ..generation.stop_tokens import stop_ids
from ..models.context_window import context_window
from ..models.load import check_vocabulary, load_config, load_model, load_tokenizer
from ..recipe.arguments import construct, name_and_fields
from ..rollouts.generate import GenerateRollout
from ..sampling import Sampling
from ..teacher import Capability, Teacher
from ..teachers import TEACHERS, check_teacher, check_tokens
from .evaluate import Evaluation, check, evaluate
from .settings import EvalSettings

DEFAULT_CONTEXT_LENGTH = 512  # of prompts, for models whose configurations name none
MAX_NEW_TOKENS = 256  # or half of the context length, where that is less


@dataclass(frozen=True)
class Prepared:
    """Everything that an evaluation needs besides the model's weights, checked."""

    tokenizer: Any
    examples: Examples
    rollout: GenerateRollout
    sampling: Sampling
    teacher: Teacher | None  # its weights are not loaded yet


@dataclass(frozen=True)
class LoadedModel(Prepared):
    """A model ready to be evaluated, with the prompts that the settings name."""

    model: Any


def evaluate_model(
    model_name: str, settings: EvalSettings, output: Path | None = None, progress: Progress | None = None
) -> Evaluation:
    """Load a model, the data and the teacher by name and evaluate the model, on the accelerator if there is one.

    Args:
        output, progress: see `evaluate`.

    Raises:
        ValueError: in one sentence, if something is missing, does not fit together or exceeds the context length;
            before weights are loaded where possible.
    """
    return evaluate_loaded(load_for_evaluation(model_name, settings), settings, output, progress)


def evaluate_loaded(
    loaded: LoadedModel, settings: EvalSettings, output: Path | None = None, progress: Progress | None = None
) -> Evaluation:
    """Evaluate a model that is already loaded, with the settings that it was loaded for."""
    device: torch.device = loaded.model.device
    search = (64 if device.type == "cpu" else 256) if settings.batch_size is None else None
    return evaluate(
        loaded.model,
        loaded.tokenizer,
        loaded.examples,
        loaded.rollout,
        loaded.sampling,
        loaded.teacher,
        settings.seeds,
        metrics=settings.metrics,
        length_buckets=settings.length_buckets,
        exposure_bias=settings.exposure_bias,
        output=output,
        first_batch_size=search,
        progress=progress,
    )


def load_for_evaluation(
    model_name: str, settings: EvalSettings, loaded: LoadedModel | None = None, **options: Any
) -> LoadedModel:
    """Load a model with its tokenizer, the prompts and the teacher.

    Args:
        loaded: the same model, where it is loaded already for other settings with the same dtype.
        options: further arguments of the model's `from_pretrained`.
    """
    prepared = prepare(load_tokenizer(model_name), load_config(model_name), settings)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = loaded.model if loaded else load_model(model_name, dtype=settings.dtype, **options).to(device).eval()
    if prepared.teacher is not None:
        prepared.teacher.to(device)
    sampling = replace(prepared.sampling, stop_ids=tuple(stop_ids(prepared.tokenizer, model)))
    return LoadedModel(**{**vars(prepared), "sampling": sampling}, model=model)


def prepare(tokenizer: Any, config: Any, settings: EvalSettings) -> Prepared:
    """Read the data and check that a model of this tokenizer and configuration can be evaluated; loads no weights.

    Raises:
        ValueError: as `evaluate_model`.
    """
    configs = [config]
    check_vocabulary(tokenizer, config, "the model has")
    teacher = None if settings.teacher is None else _teacher(settings.teacher)
    if teacher is not None:
        configs += _teacher_configs(teacher, tokenizer)
    settings = with_lengths(settings, *configs)
    rollout = GenerateRollout() if settings.batch_size is None else GenerateRollout(settings.batch_size)
    sampling = Sampling(cast(int, settings.max_new_tokens), settings.temperature)
    examples = _prompts(settings, tokenizer, context_window(*configs))
    metrics = (settings.metrics, settings.length_buckets)
    check(examples, sampling, teacher, settings.seeds, *metrics, settings.exposure_bias)
    return Prepared(tokenizer, examples, rollout, sampling, teacher)


def _teacher(block: str | Mapping[str, Any]) -> Teacher:
    """The teacher of a name, or of a block such as `{server: {url: …}}`.

    Raises:
        RecipeError: for a mistake in the block.
        ValueError: for a teacher that cannot tell the distributions of new responses.
    """
    name, fields = ("local", {"model": block}) if isinstance(block, str) else name_and_fields(dict(block))
    teacher: Teacher = construct(TEACHERS.get(name), fields, f"teacher.{name}", registry=TEACHERS)
    if teacher.needs_student:
        raise ValueError("an evaluation has no student in training that could be the teacher: name a model")
    check_teacher(teacher, frozenset({Capability.TOP_K}), {"student"}, "an evaluation with a teacher")
    return teacher


def _teacher_configs(teacher: Teacher, tokenizer: Any) -> list[Any]:
    """The configurations of a teacher and its parts, which fit the tokenizer; of a server its limit alone."""
    configs = []
    for part in teacher.parts().values():
        if (config := check_tokens(part, tokenizer)) is not None:
            configs.append(config)
        if part.context_length is not None:
            served: Any = PreTrainedConfig()
            served.max_position_embeddings = part.context_length
            configs.append(served)
    return configs


def with_lengths(settings: EvalSettings, *configs: Any) -> EvalSettings:
    """The settings with `max_new_tokens`, which by default follows from the models' context length.

    Raises:
        ValueError: if it leaves no room for a prompt.
    """
    context_length = context_window(*configs)
    default = min(MAX_NEW_TOKENS, (context_length or DEFAULT_CONTEXT_LENGTH) // 2)
    longest = default if settings.max_new_tokens is None else settings.max_new_tokens
    if context_length is not None and longest >= context_length:
        raise ValueError(
            f"--max-new-tokens {longest} leaves no room for a prompt in a context length of {context_length}: lower it"
        )
    return replace(settings, max_new_tokens=longest)


def _prompts(settings: EvalSettings, tokenizer: Any, context_length: int | None) -> Examples:
    """The prompts of the settings' data as examples, with room for a response after every prompt."""
    longest = cast(int, settings.max_new_tokens)
    lengths = {
        "max_length": context_length or DEFAULT_CONTEXT_LENGTH + longest,
        "max_prompt_length": settings.max_prompt_length,
    }
    return load_data(settings.data.model_copy(update=lengths), tokenizer, context_length, longest)
