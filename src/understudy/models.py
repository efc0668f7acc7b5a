"""Students and tokenizers from what a recipe says about them."""

import copy
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .data import stop_ids
from .playground.names import resolve
from .recipe import Recipe, RecipeError, Student
from .registry import nearest

logger = logging.getLogger(__name__)
_PROBE = "The quick brown fox, aged 1234.5: naïve café — 東京 ∑ \n\t def f(x): return x**2"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name or folder.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"no tokenizer can be loaded from {name!r} ({_first_line(error)}); {_remedy(name)}") from None


def load_student(recipe: Recipe, teacher: str | None) -> nn.Module:
    """The model that a recipe's student block describes; `teacher` is the teacher's name, for students made from it."""
    student = recipe.student
    if student.model is not None:
        model = load_model(student.model, dtype=student.dtype, **student.options)
    elif student.fresh is not None:
        model = _fresh(recipe, student.fresh, teacher)
    else:
        model = _cut(recipe, student.layers or [], teacher)
    if student.peft is not None:
        model = _with_adapters(recipe, model, student.peft)
    return model


def load_model(name: str, **options: Any) -> nn.Module:
    """A causal language model by name or folder, which may hold adapters.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(resolve(name), **options)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"no model can be loaded from {name!r} ({_first_line(error)}); {_remedy(name)}") from None


def load_config(name: str) -> Any:
    """A model's configuration by name or folder."""
    try:
        return AutoConfig.from_pretrained(resolve(name)).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"no model can be loaded from {name!r} ({_first_line(error)}); {_remedy(name)}") from None


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher that reads text differently from the student: its scores would belong to other tokens.

    Vocabularies may be padded differently; that is the models' business, not the tokenizers'.

    Raises:
        RecipeError: naming the first difference.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    remedy = "choose a teacher and a student of one family, whose tokens are the same"
    if ours != theirs:
        differing = [t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t)]
        token = differing[0]
        raise RecipeError(
            f"the tokenizers of student and teacher differ in {len(differing)} of {len(ours)} and {len(theirs)} tokens "
            f"({token!r} is {ours.get(token, 'absent')} for the student and {theirs.get(token, 'absent')} for the "
            f"teacher): {remedy}"
        )
    if student.encode(_PROBE, add_special_tokens=False) != teacher.encode(_PROBE, add_special_tokens=False):
        raise RecipeError(f"the tokenizers of student and teacher have the same tokens but cut text differently: {remedy}")
    if student.eos_token_id != teacher.eos_token_id:
        logger.warning(
            "student and teacher end their answers differently (%r and %r): a base model beside a chat model, perhaps; "
            "watch the share of truncated responses",
            student.eos_token,
            teacher.eos_token,
        )
    if student.chat_template != teacher.chat_template:
        logger.warning("student and teacher have different chat templates; the student's is used")


def _fresh(recipe: Recipe, fields: dict[str, Any], teacher: str | None) -> nn.Module:
    """The teacher's configuration with some fields changed (or a whole one with `model_type`), and random weights."""
    if "model_type" in fields:
        known = AutoConfig.for_model(fields["model_type"])
        changes = {name: value for name, value in fields.items() if name != "model_type"}
        _check_fields(recipe, known, changes)
        config = type(known)(**changes)
    elif teacher is None:
        raise recipe.complaint(
            "student.fresh", "a fresh student without a teacher needs a model_type, such as llama, and its fields"
        )
    else:
        base = load_config(teacher)
        _check_fields(recipe, base, fields)
        config = copy.deepcopy(base)
        config.update(fields)
        _follow_up(config, base, fields)
    config.dtype = None
    try:
        return AutoModelForCausalLM.from_config(config, dtype=recipe.student.dtype)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise recipe.complaint("student.fresh", f"no model can be made with these fields: {_first_line(error)}") from None


def _check_fields(recipe: Recipe, config: Any, fields: dict[str, Any]) -> None:
    known = {*config.to_dict(), *config.attribute_map}
    for name in fields:
        if name not in known:
            close = nearest(name, sorted(known)) if len(name) > 2 else ""
            close = close if "did you mean" in close else ""
            message = f"a {config.model_type} configuration has no field {name!r}{close}"
            raise recipe.complaint(f"student.fresh.{name}", message)


def _follow_up(config: Any, base: Any, fields: dict[str, Any]) -> None:
    """Bring fields along that follow from the changed ones: layer types from layers, a head's width from the model's."""
    kinds = getattr(base, "layer_types", None)
    if kinds and "layer_types" not in fields:
        config.layer_types = (list(kinds) * config.num_hidden_layers)[: config.num_hidden_layers]
    derived = getattr(base, "head_dim", None) == base.hidden_size // base.num_attention_heads
    if derived and hasattr(config, "head_dim") and "head_dim" not in fields:
        config.head_dim = config.hidden_size // config.num_attention_heads
    heads = getattr(base, "num_key_value_heads", None)
    if heads is not None and "num_key_value_heads" not in fields and config.num_attention_heads % heads:
        config.num_key_value_heads = config.num_attention_heads


def _cut(recipe: Recipe, layers: list[int], teacher: str | None) -> nn.Module:
    """The teacher with only some of its layers: a student that starts from the teacher's weights."""
    if teacher is None:
        raise recipe.complaint("student.layers", "a student cut from the teacher needs a local teacher")
    source = load_model(teacher, dtype=recipe.student.dtype)
    config = copy.deepcopy(source.config)
    depth = config.num_hidden_layers
    if not layers or any(not 0 <= layer < depth for layer in layers):
        raise recipe.complaint("student.layers", f"layers are numbers from 0 to {depth - 1} of the teacher, not {layers}")
    stacks = [n for n, m in source.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise recipe.complaint("student.layers", f"the layers of a {config.model_type} cannot be told apart; use fresh")
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    student = AutoModelForCausalLM.from_config(config, dtype=recipe.student.dtype)
    prefix = stacks[0] + "."
    weights = source.state_dict()
    kept = {name: w for name, w in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{n.removeprefix(start)}": w for n, w in weights.items() if n.startswith(start)}
    student.load_state_dict(kept)
    return student


def _with_adapters(recipe: Recipe, model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    fields = {"task_type": "CAUSAL_LM", **fields}
    unknown = [name for name in fields if name not in LoraConfig.__dataclass_fields__]
    if unknown:
        message = f"LoraConfig has no field {unknown[0]!r}{nearest(unknown[0], list(LoraConfig.__dataclass_fields__))}"
        raise recipe.complaint(f"student.peft.{unknown[0]}", message)
    try:
        return get_peft_model(model, LoraConfig(**fields))
    except (ValueError, TypeError) as error:
        raise recipe.complaint("student.peft", _first_line(error)) from None


def teacher_name(recipe: Recipe) -> str | None:
    """The name or folder of the recipe's teacher, if it has one that is loaded by name."""
    return recipe.teacher[1].get("model") if recipe.teacher is not None else None


def tokenizer_name(recipe: Recipe) -> str:
    """Where the student's tokenizer comes from."""
    student: Student = recipe.student
    name = student.tokenizer or student.model or teacher_name(recipe)
    if name is None:
        raise recipe.complaint("student", "a fresh student without a teacher needs a tokenizer: add student.tokenizer")
    return name


def all_stop_ids(tokenizer: Any, *models: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, its chat template's, and what the models say they end with."""
    found = set(stop_ids(tokenizer))
    for model in models:
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found |= set() if own is None else {own} if isinstance(own, int) else set(own)
    return sorted(i for i in found if i < len(tokenizer))


def window_of(*models: Any) -> int | None:
    """How many positions all of the models have; None stands for no model, and is the answer if no model says."""
    configs = [model.config.get_text_config() for model in models if model is not None]
    windows = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((window for window in windows if window), default=None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _remedy(name: str) -> str:
    if Path(name).exists():
        return "the folder must hold a model and its tokenizer as save_pretrained writes them"
    return "there is no such folder here, and it could not be had from the hub: check the name, the path and the network"
