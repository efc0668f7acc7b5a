"""PEFT adapters: the base model below them, adding them to a student, and what of them can be saved."""

import copy
import logging
from typing import Any

import torch
from torch import nn

from ..recipe import Recipe
from ..registry import did_you_mean
from .load import reason
from .saved import check_adapters, check_merge, check_same, has_memory, probe_log_probs, samples, shared_copy

logger = logging.getLogger(__name__)
_NEEDS_DATA = ("eva", "corda", "lora_ga", "loftq")  # initialisations that need data or options from outside a recipe


def without_adapters(model: Any) -> Any:
    """The model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(recipe: Recipe, fields: dict[str, Any]) -> Any:
    """The LoraConfig of a recipe's peft block.

    Raises:
        RecipeError: for an unknown field, and for an initialisation that a recipe cannot describe.
    """
    from peft import LoraConfig

    field_names = LoraConfig.__dataclass_fields__
    for name in fields:
        if name not in field_names:
            message = f'LoraConfig has no field "{name}"{did_you_mean(str(name), field_names)}'
            raise recipe.error(f"student.peft.{name}", message)
    init = fields.get("init_lora_weights")
    if init in _NEEDS_DATA:
        message = f"init_lora_weights: {init} needs data or a quantized model, which a recipe does not give it: "
        raise recipe.error("student.peft.init_lora_weights", message + "use true, gaussian, orthogonal, pissa or olora")
    try:
        own = copy.deepcopy(fields)  # PEFT adds names of its own to the lists that it is given
        return LoraConfig(**{"task_type": "CAUSAL_LM", "revision": recipe.student.options.get("revision"), **own})
    except (ValueError, TypeError) as error:
        raise recipe.error("student.peft", f"student.peft: {reason(error)}") from None


def add_adapters(recipe: Recipe, model: nn.Module, config: Any) -> Any:
    """The model with PEFT adapters.

    Raises:
        RecipeError: if PEFT refuses the configuration for this model, or if the result could not be saved as it is.
    """
    base = None if getattr(model, "hf_quantizer", None) is not None else shared_copy(model)
    weights = list(model.parameters())  # PEFT changes the model itself
    before = samples(weights)
    adapted = with_adapters(recipe, model, config)
    if not recipe.student.merge and any(not a.equal(b) for a, b in zip(before, samples(weights), strict=True)):
        message = f"init_lora_weights: {config.init_lora_weights} changes the model below the adapters, "
        message += "and adapters alone would be saved without that change: add merge: true, or use another one"
        raise recipe.error("student.peft.init_lora_weights", message)
    if base is not None:
        _check_saveable(recipe, base, adapted)
    return adapted


def with_adapters(recipe: Recipe, model: nn.Module, config: Any) -> Any:
    """The model with PEFT adapters, whose effect on it is not checked.

    Raises:
        RecipeError: if PEFT refuses the configuration for this model.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise recipe.error("student.peft", f"student.peft: {reason(error)}") from None


def _check_saveable(recipe: Recipe, base: nn.Module, model: Any) -> None:
    """Refuse adapters that would be saved, or merged, as another model.

    Raises:
        RecipeError: with the remedy.
    """
    merge = recipe.student.merge
    try:
        if not merge:
            check_adapters(base, model)
        elif has_memory(model):
            check_merge(model)
        else:
            logger.warning("there is no memory to try out merging the adapters; it is checked after training")
    except (torch.OutOfMemoryError, MemoryError):
        logger.warning("there is no memory to try out the adapters; they are checked after training")
    except Exception as error:  # PEFT's merges raise anything
        tied = getattr(model.config, "tie_word_embeddings", False)
        remedy = "leave merge out" if merge and recipe.student.model is not None else "choose other target modules"
        remedy += ", or leave embeddings and head out of them, whose weights are tied in this model" if tied else ""
        message = f"these adapters cannot be {'merged' if merge else 'saved'} ({reason(error)}): {remedy}"
        raise recipe.error("student.merge" if merge else "student.peft", message) from error


def merged(model: Any) -> Any:
    """The model with its adapters merged into its weights.

    Raises:
        SavedModelDiffers: if that is another model, as it is for an adapted head that is tied to the embeddings.
    """
    expected = probe_log_probs(model)
    result = model.merge_and_unload()
    check_same(expected, result, "the merged model", rounding=result.dtype.itemsize < 4)
    return result
