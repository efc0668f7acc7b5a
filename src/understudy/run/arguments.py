"""A recipe's training block as transformers' TrainingArguments."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..recipe import Recipe
from ..recipe.arguments import convert
from ..registry import did_you_mean

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The training block, which is TrainingArguments, with defaults for the run's folder and for logging.

    Raises:
        RecipeError: for an unknown field, a wrong value, and evaluation without held-out data.
    """
    values: dict[str, Any] = {
        "output_dir": f"runs/{recipe.name}",
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 2,
        "disable_tqdm": False,  # by default this depends on how much transformers logs
    }
    names, hints = {f.name for f in fields(TrainingArguments) if f.init}, get_type_hints(TrainingArguments)
    for key, value in recipe.training.items():
        if key not in names:
            message = f'transformers\' TrainingArguments have no field "{key}"{did_you_mean(key, names)}'
            raise recipe.error(f"training.{key}", message)
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if (key, value) == ("bf16", "auto"):
            value = gains_from_bf16()
        hint: Any = hints[key]
        with recipe.locating(f"training.{key}"):  # the types that TrainingArguments themselves don't check
            values[key] = convert(value, hint, f"training.{key}") if hint in (int, float, bool) else value
        if key in _AT_LEAST_ONE and int(value) < 1:
            raise recipe.error(f"training.{key}", f"training.{key} must be at least 1, not {value}")
    if values.get("eval_strategy", "no") not in ("no", False) and recipe.evaluate.dataset is None:
        message = "evaluating while training needs held-out data: add evaluate.dataset, or leave eval_strategy out"
        raise recipe.error("training.eval_strategy", message)
    has_best = values.get("metric_for_best_model") or values.get("load_best_model_at_end")
    if recipe.evaluate.patience is not None and (values.get("eval_strategy", "no") in ("no", False) or not has_best):
        message = "patience needs training.eval_strategy and metric_for_best_model, such as steps and eval_loss"
        raise recipe.error("evaluate.patience", message)
    return _construct(recipe, values)


def _construct(recipe: Recipe, values: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments of these values; an error of theirs gets the line of the key that its message is about."""
    try:
        arguments = TrainingArguments(**values)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # fails where the logger's package is not installed
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        key = next((key for key in recipe.training if key in str(error)), "")
        key = key or next((key for key, value in recipe.training.items() if f"{value} " in f"{error} "), "")
        message = str(error).strip().split("\n")[0]
        raise recipe.error(f"training.{key}".rstrip("."), f"training.{key}: {message}".replace(".:", ":")) from None
    return arguments


def gains_from_bf16() -> bool:
    """Does this machine multiply in bfloat16: with a GPU's tensor cores, or a CPU's AVX-512, AMX or SVE?"""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
