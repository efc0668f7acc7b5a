"""PEFT adapters: the base model below them, and adding them to a student."""

from typing import Any

from torch import nn

from ..recipe import Recipe
from ..registry import did_you_mean
from .load import reason


def without_adapters(model: Any) -> Any:
    """The model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(recipe: Recipe, fields: dict[str, Any]) -> Any:
    """The LoraConfig of a recipe's peft block."""
    from peft import LoraConfig

    field_names = LoraConfig.__dataclass_fields__
    for name in fields:
        if name not in field_names:
            message = f'LoraConfig has no field "{name}"{did_you_mean(str(name), field_names)}'
            raise recipe.error(f"student.peft.{name}", message)
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except (ValueError, TypeError) as error:
        raise recipe.error("student.peft", f"student.peft: {reason(error)}") from None


def add_adapters(recipe: Recipe, model: nn.Module, config: Any) -> Any:
    """The model with PEFT adapters.

    Raises:
        RecipeError: if PEFT refuses the configuration for this model.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise recipe.error("student.peft", f"student.peft: {reason(error)}") from None
