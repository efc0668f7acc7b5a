"""Students and tokenizers from what a recipe says about them."""

import copy
import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..playground.names import resolve
from ..recipe import Recipe, RecipeError, Student
from ..registry import did_you_mean

logger = logging.getLogger(__name__)
_PROBE = "The quick brown fox, aged 1234.5: naïve café — 東京 ∑ \n\t def f(x): return x**2"


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn what is raised while transformers loads something into a sentence that says what to do.

    Raises:
        RecipeError: naming what could not be loaded from where, and why.
    """
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        if isinstance(error, RecipeError) or getattr(error, "errno", None) == errno.ENOSPC or "memory" in str(error):
            raise
        raise RecipeError(
            f'no {what} can be loaded from "{name}" ({_reason(error)}); {_remedy(resolve(name), error)}'
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name or folder.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    place = resolve(name)
    with loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(place)
        if not len(tokenizer):  # what transformers makes of a folder with a model alone
            raise ValueError("it has no tokens")
    return tokenizer


def load_model(name: str, **options: Any) -> Any:
    """A causal language model by name or folder, which may hold adapters.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    place = resolve(name)
    with loading("model", name):
        # A whole path, because adapters remember where the model below them lies.
        return AutoModelForCausalLM.from_pretrained(Path(place).resolve() if Path(place).is_dir() else place, **options)


def load_config(name: str) -> Any:
    """A model's configuration by name or folder; for adapters that of the model below them.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    place = resolve(name)
    with loading("model", name):
        adapters = Path(place) / "adapter_config.json"
        if adapters.is_file():
            return load_config(json.loads(adapters.read_text())["base_model_name_or_path"])
        return AutoConfig.from_pretrained(place).get_text_config()


def student_config(recipe: Recipe, teacher: str | None) -> Any:
    """The configuration that the recipe's student will have; refuses what is wrong with it before weights are loaded.

    `teacher` is the teacher's name, for students made from it.
    """
    student = recipe.student
    if student.peft is not None:
        _adapters(recipe, student.peft)
    if student.model is not None:
        return load_config(student.model)
    if student.fresh is not None:
        return _fresh_config(recipe, student.fresh, teacher)
    return _cut_config(recipe, student.layers or [], teacher)


def load_student(recipe: Recipe, config: Any, teacher: str | None) -> Any:
    """The model that a recipe's student block describes, where `config` is its `student_config`."""
    student = recipe.student
    if student.model is not None:
        model = load_model(student.model, **{"dtype": student.dtype, **student.options})
    elif student.fresh is not None:
        model = _fresh(recipe, config)
    else:
        assert teacher is not None
        model = _cut(recipe, config, student.layers or [], teacher)
    return model if student.peft is None else _with_adapters(recipe, model, _adapters(recipe, student.peft))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any, whose: str) -> None:
    """Refuse a model with fewer embeddings than its tokenizer has tokens; more are padding.

    Raises:
        RecipeError: with both numbers.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is not None and rows < len(tokenizer):
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens and {whose} embeddings for {rows} only: "
            f"use the tokenizer that belongs to the model, or give a model that is made for this one"
        )


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
        raise RecipeError(
            f"the tokenizers of student and teacher have the same tokens but cut text differently: {remedy}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        logger.warning(
            "student and teacher end their answers differently (%r and %r): a base model beside a chat model, perhaps; "
            "watch the share of truncated responses",
            student.eos_token,
            teacher.eos_token,
        )
    if student.chat_template != teacher.chat_template:
        logger.warning("student and teacher have different chat templates; the student's is used")


def _fresh_config(recipe: Recipe, fields: dict[str, Any], teacher: str | None) -> Any:
    """The teacher's configuration with some fields changed, or a whole one with `model_type`."""
    if "model_type" in fields:
        kind = fields["model_type"]
        if kind not in CONFIG_MAPPING:
            message = f'transformers knows no model_type "{kind}"{did_you_mean(str(kind), CONFIG_MAPPING)}'
            raise recipe.complaint("student.fresh.model_type", message)
        base, changes = AutoConfig.for_model(kind), {k: v for k, v in fields.items() if k != "model_type"}
    elif teacher is None:
        raise recipe.complaint(
            "student.fresh", "a fresh student without a teacher needs a model_type, such as llama, and its fields"
        )
    else:
        base, changes = load_config(teacher), fields
    _check_fields(recipe, base, changes)
    try:
        if "model_type" in fields:
            config = type(base)(**changes)
        else:
            config = copy.deepcopy(base)
            config.update(changes)
            _follow_up(config, base, changes)
    except Exception as error:  # configurations check themselves in many ways
        message = f"no configuration can be made with these fields: {_reason(error)}"
        raise recipe.complaint("student.fresh", message) from error
    config.dtype = None
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # of the teacher's weights, which are not taken
    return config


def _fresh(recipe: Recipe, config: Any) -> Any:
    """A model with random weights."""
    dtype = recipe.student.dtype
    try:
        return AutoModelForCausalLM.from_config(config, dtype="float32" if dtype == "auto" else dtype)
    except Exception as error:  # models check their configurations in many ways
        message = f"no model can be made with these fields: {_reason(error)}"
        raise recipe.complaint("student.fresh", message) from error


def _check_fields(recipe: Recipe, config: Any, fields: dict[str, Any]) -> None:
    known = {*config.to_dict(), *config.attribute_map}
    for name in fields:
        if name not in known:
            message = f'a {config.model_type} configuration has no field "{name}"{did_you_mean(str(name), known)}'
            raise recipe.complaint(f"student.fresh.{name}", message)


def _follow_up(config: Any, base: Any, fields: dict[str, Any]) -> None:
    """Bring fields along that follow from changed ones: layer types from layers, a head's width from the model's."""
    kinds = getattr(base, "layer_types", None)
    if kinds and "layer_types" not in fields:
        config.layer_types = (list(kinds) * config.num_hidden_layers)[: config.num_hidden_layers]
    derived = getattr(base, "head_dim", None) == base.hidden_size // base.num_attention_heads
    if derived and hasattr(config, "head_dim") and "head_dim" not in fields:
        config.head_dim = config.hidden_size // config.num_attention_heads
    heads = getattr(base, "num_key_value_heads", None)
    one_each = heads == base.num_attention_heads
    if heads and "num_key_value_heads" not in fields and (one_each or config.num_attention_heads % heads):
        config.num_key_value_heads = config.num_attention_heads


def _cut_config(recipe: Recipe, layers: list[int], teacher: str | None) -> Any:
    if teacher is None:
        raise recipe.complaint("student.layers", "a student cut from the teacher needs a local teacher")
    config = copy.deepcopy(load_config(teacher))
    depth = config.num_hidden_layers
    if not layers or any(not 0 <= layer < depth for layer in layers):
        message = f"the teacher's layers are numbered from 0 to {depth - 1}; keep some of these, not {layers}"
        raise recipe.complaint("student.layers", message)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    return config


def _cut(recipe: Recipe, config: Any, layers: list[int], teacher: str) -> Any:
    """The teacher with only some of its layers: a student that starts from the teacher's weights."""
    source = load_model(teacher, dtype=recipe.student.dtype)
    depth = source.config.get_text_config().num_hidden_layers
    lists = [name for name, m in source.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    stacks = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    student = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    if len(stacks) != 1 or not hasattr(student, stacks[0].partition(".")[0]):
        message = f"the layers of a {config.model_type} cannot be told apart; use a fresh student"
        raise recipe.complaint("student.layers", message)
    prefix = stacks[0] + "."
    weights = source.state_dict()
    kept = {name: w for name, w in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{n.removeprefix(start)}": w for n, w in weights.items() if n.startswith(start)}
    student.load_state_dict(kept)
    student.generation_config = copy.deepcopy(source.generation_config)
    return student


def _adapters(recipe: Recipe, fields: dict[str, Any]) -> Any:
    """The LoraConfig that a peft block is."""
    from peft import LoraConfig

    known = LoraConfig.__dataclass_fields__
    for name in fields:
        if name not in known:
            message = f'LoraConfig has no field "{name}"{did_you_mean(str(name), known)}'
            raise recipe.complaint(f"student.peft.{name}", message)
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except (ValueError, TypeError) as error:
        raise recipe.complaint("student.peft", f"student.peft: {_reason(error)}") from None


def _with_adapters(recipe: Recipe, model: nn.Module, config: Any) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise recipe.complaint("student.peft", f"student.peft: {_reason(error)}") from None


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


def _reason(error: Exception) -> str:
    """The first line of what an exception says, or its name where it says nothing."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().split("\n")[0] or type(error).__name__).rstrip(".:")


def _remedy(place: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what is missing"
    if isinstance(error, SafetensorError):
        return "a file of weights is damaged: copy or download it again"
    if Path(place).exists():
        return "the folder must hold a model and its tokenizer as save_pretrained writes them"
    return "there is no such folder here, and the hub gave none: check the name, the path and the network"
