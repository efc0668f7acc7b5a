"""The student of a recipe: a model by name, a new one with random weights, or some of the teacher's layers."""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ..recipe import Recipe
from ..registry import did_you_mean
from .adapters import add_adapters, lora_config, merged, with_adapters
from .layers import config_of_layers, take_layers
from .load import holds_adapters, is_soft_prompt, load_config, load_model, reason, resolve
from .origin import repair_generation_config
from .saved import check_adapters, check_merge, shared_copy
from .skeleton import skeleton


def student_config(recipe: Recipe, teacher: str | None) -> Any:
    """The configuration of the recipe's student, checked before weights are loaded.

    `teacher` is the teacher's name, for students derived from it.
    """
    student = recipe.student
    if student.peft is not None:
        lora_config(recipe, student.peft)
    if student.model is not None:
        config = load_config(student.model)
        _check_adapters_of(recipe, student.model)
        return config
    if student.fresh is not None:
        return _fresh_config(recipe, copy.deepcopy(student.fresh), teacher)
    return _layers_config(recipe, student.layers or [], teacher)


def load_student(recipe: Recipe, config: Any, teacher: str | None) -> Any:
    """The model that a recipe's student block describes, where `config` is its `student_config`.

    Adapters are trained further, or, with a peft block, merged below new ones.
    """
    student = recipe.student
    if student.model is not None:
        model = _named_model(recipe, student.model)
    elif student.fresh is not None:
        model = _new_model(recipe, config)
    else:
        assert teacher is not None
        model = _with_layers(recipe, config, student.layers or [], teacher)
    repair_generation_config(model)
    return model if student.peft is None else add_adapters(recipe, model, lora_config(recipe, student.peft))


def student_skeleton(recipe: Recipe, config: Any) -> Any:
    """As `load_student`, without weights: for its size, and to run in `skeleton.without_memory`.

    Raises:
        RecipeError: for fields that are not a valid model, and adapters that do not fit it.
    """
    student = recipe.student
    with torch.device("meta"):
        model = skeleton(config, student.dtype) if student.fresh is None else _new_model(recipe, config)
        if student.model is not None and student.peft is None and holds_adapters(student.model):
            from peft import PeftConfig, get_peft_model

            adapters = PeftConfig.from_pretrained(resolve(student.model))
            adapters.inference_mode = False
            return get_peft_model(model, adapters)
        if student.peft is None:
            return model
        adapters = lora_config(recipe, {**student.peft, "init_lora_weights": True})  # some initialisations compute
        return with_adapters(recipe, model, adapters)


def _check_adapters_of(recipe: Recipe, name: str) -> None:
    """Check what becomes of the adapters that a student comes with, if it comes with any."""
    student, adapters = recipe.student, holds_adapters(name)
    if adapters and is_soft_prompt(name):
        message = f"{name} holds a soft prompt, which is neither trained further nor merged: name the model below it"
        raise recipe.error("student.model", message)
    if adapters and student.peft is not None and not student.merge:
        raise recipe.error(
            "student.peft",
            f"{name} holds adapters already, and new ones on top of them would be saved without them: leave peft out "
            "to go on training them, or add merge: true to merge them and train new ones",
        )
    if student.merge and student.peft is None and not adapters:
        message = f"merge is for adapters, and {name} has none: give the student a peft block, or leave merge out"
        raise recipe.error("student.merge", message)


def _named_model(recipe: Recipe, name: str) -> Any:
    student, adapters = recipe.student, holds_adapters(name)
    options = {"dtype": student.dtype, **copy.deepcopy(student.options)}
    model = load_model(name, trainable=adapters and student.peft is None, **options)
    if not adapters:
        return model
    try:
        if student.peft is not None:
            return merged(model)
        if student.merge:
            check_merge(model)
        else:
            check_adapters(shared_copy(model).unload(), model)
    except Exception as error:  # PEFT's merges raise anything
        action, remedy = ("merged", "leave merge out") if student.merge else ("saved again", "add merge: true")
        message = f"the adapters of {name} cannot be {action} ({reason(error)}): {remedy}"
        raise recipe.error("student.merge" if student.merge else "student.model", message) from error
    return model


def tokenizer_name(recipe: Recipe, teacher: str | None) -> str:
    """Name or folder of the student's tokenizer; `teacher` is that of the teacher's, for a student derived from it."""
    student = recipe.student
    name = student.tokenizer or student.model or teacher
    if name is None:
        raise recipe.error("student", "a fresh student without a teacher needs a tokenizer: add student.tokenizer")
    return name


def _fresh_config(recipe: Recipe, fields: dict[str, Any], teacher: str | None) -> Any:
    """The teacher's configuration with some fields changed, or a whole one with `model_type`."""
    if "model_type" in fields:
        kind = fields["model_type"]
        if kind not in CONFIG_MAPPING:
            message = f'transformers knows no model_type "{kind}"{did_you_mean(str(kind), CONFIG_MAPPING)}'
            raise recipe.error("student.fresh.model_type", message)
        base, changes = AutoConfig.for_model(kind), {k: v for k, v in fields.items() if k != "model_type"}
    elif teacher is None:
        raise recipe.error(
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
            _update_dependent_fields(config, base, changes)
    except Exception as error:  # configurations check themselves in many ways
        message = f"these fields are not a valid configuration: {reason(error)}"
        raise recipe.error("student.fresh", message) from error
    config.dtype = None
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # it describes the teacher's weights, which are not used
    return config


def _new_model(recipe: Recipe, config: Any) -> Any:
    """A model with random weights."""
    dtype = recipe.student.dtype
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype="float32" if dtype == "auto" else dtype, trust_remote_code=False
        )
    except Exception as error:  # models check their configurations in many ways
        message = f"these fields are not a valid model: {reason(error)}"
        raise recipe.error("student.fresh", message) from error


def _check_fields(recipe: Recipe, config: Any, fields: dict[str, Any]) -> None:
    field_names = {*config.to_dict(), *config.attribute_map}
    for name in fields:
        if name not in field_names:
            message = f'a {config.model_type} configuration has no field "{name}"{did_you_mean(str(name), field_names)}'
            raise recipe.error(f"student.fresh.{name}", message)


def _update_dependent_fields(config: Any, base: Any, fields: dict[str, Any]) -> None:
    """Update fields that depend on changed ones: layer types on the number of layers, a head's width on the model's."""
    kinds = getattr(base, "layer_types", None)
    if kinds and "layer_types" not in fields:
        config.layer_types = (list(kinds) * config.num_hidden_layers)[: config.num_hidden_layers]
    derived = getattr(base, "head_dim", None) == base.hidden_size // base.num_attention_heads
    if derived and hasattr(config, "head_dim") and "head_dim" not in fields:
        config.head_dim = config.hidden_size // config.num_attention_heads
    heads = getattr(base, "num_key_value_heads", None)
    multi_head = heads == base.num_attention_heads
    if heads and "num_key_value_heads" not in fields and (multi_head or config.num_attention_heads % heads):
        config.num_key_value_heads = config.num_attention_heads


def _layers_config(recipe: Recipe, layers: list[int], teacher: str | None) -> Any:
    if teacher is None:
        raise recipe.error("student.layers", "a student of the teacher's layers needs a local teacher: add one")
    config = load_config(teacher)
    depth = config.num_hidden_layers
    if not layers or any(not 0 <= layer < depth for layer in layers):
        message = f"the teacher's layers are numbered from 0 to {depth - 1}; choose some of these, not {layers}"
        raise recipe.error("student.layers", message)
    try:
        return config_of_layers(config, layers)
    except Exception as error:  # configurations check themselves in many ways
        message = f"a {config.model_type} cannot be configured with these layers alone: {reason(error)}"
        raise recipe.error("student.layers", message) from error


def _with_layers(recipe: Recipe, config: Any, layers: list[int], teacher: str) -> Any:
    """The teacher with only some of its layers: a student that starts from the teacher's weights."""
    teacher_model = load_model(teacher, dtype=recipe.student.dtype)
    try:
        if holds_adapters(teacher):
            teacher_model = merged(teacher_model)
        student = AutoModelForCausalLM.from_config(config, dtype=teacher_model.dtype, trust_remote_code=False)
        take_layers(teacher_model, student, layers)
    except Exception as error:  # models check their configurations in many ways
        raise recipe.error("student.layers", reason(error)) from error
    student.generation_config = copy.deepcopy(teacher_model.generation_config)
    return student
