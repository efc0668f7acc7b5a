"""A recipe's training block as transformers' TrainingArguments."""

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..recipe import Recipe
from ..recipe.arguments import convert
from ..registry import did_you_mean
from ..training.fields import NEEDS, OLD, is_idle, out_of_range, refusal
from ..training.sharding import check_sharding


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The training block, which is TrainingArguments, with defaults for the run's folder and for logging.

    Raises:
        RecipeError: for an unknown field, a wrong value, one that would have no effect, and evaluation without held-out
            data.
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
            hint = f": use {OLD[key]}" if key in OLD else did_you_mean(key, names)
            raise recipe.error(f"training.{key}", f'transformers\' TrainingArguments have no field "{key}"{hint}')
        if (reason := refusal(key, value)) is not None:
            raise recipe.error(f"training.{key}", f"training.{key} has no effect here, so leave it out: {reason}")
        if not is_idle(key):
            values[key] = copy.deepcopy(_value(recipe, key, value, hints[key]))  # transformers changes mappings
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        values.pop("ddp_backend", None)  # there is nothing to connect
    _check_dependencies(recipe, values)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if (values.get("bf16") or several) and not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # transformers asks for it, and else would not connect the processes
    arguments = _construct(recipe, values)
    try:
        check_sharding(arguments)
    except ValueError as error:
        key = "deepspeed" if arguments.deepspeed else "fsdp" if arguments.fsdp else "use_cpu"
        raise recipe.error(f"training.{key}", f"training.{key}: {error}") from None
    check_optimizer(recipe, arguments)
    return arguments


def _value(recipe: Recipe, key: str, value: Any, hint: Any) -> Any:
    """A field's value with its type, refused if it is out of range or has no effect."""
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML reads as false
    if (key, value) == ("bf16", "auto"):
        value = gains_from_bf16()
    parts = [part for part in get_args(hint) if part is not type(None)] or [hint]
    with recipe.locating(f"training.{key}"):  # the types that TrainingArguments themselves don't check
        takes_true = key == "fsdp" and isinstance(value, bool)  # which its type does not say
        if all(part in (int, float, bool, str) for part in parts) and not takes_true:
            value = convert(value, hint, f"training.{key}")
    if (needed := out_of_range(key, value)) is not None:
        raise recipe.error(f"training.{key}", f"training.{key} must be {needed}, not {value}")
    return value


def _check_dependencies(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse fields that need others, which the recipe lacks."""
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for key, (other, too_little) in NEEDS.items():
        value = values.get(other, defaults.get(other))
        is_off = other in recipe.training and (is_left_out(value) or value == "no")  # on purpose
        if key in recipe.training and not is_left_out(recipe.training[key]) and value in too_little and not is_off:
            raise recipe.error(
                f"training.{key}", f"training.{key} has no effect without training.{other}: set that too"
            )
    evaluates = values.get("eval_strategy", "no") not in ("no", False)
    for key, asks in (("eval_strategy", evaluates), ("eval_on_start", values.get("eval_on_start"))):
        if asks and recipe.evaluate.dataset is None:
            message = f"evaluating while training needs held-out data: add evaluate.dataset, or leave {key} out"
            raise recipe.error(f"training.{key}", message)
    has_best = values.get("metric_for_best_model") or values.get("load_best_model_at_end")
    if recipe.evaluate.patience is not None and not (evaluates and has_best):
        message = "patience needs training.eval_strategy and metric_for_best_model, such as steps and eval_loss"
        raise recipe.error("evaluate.patience", message)
    if values.get("fp16") and not torch.accelerator.is_available():
        raise recipe.error("training.fp16", "training.fp16 needs a GPU: set bf16: auto, or leave it out")


def is_left_out(value: Any) -> bool:
    """Is this value as if the field were left out?"""
    return value is None or value is False or value == 0


def _construct(recipe: Recipe, values: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments of these values; an error of theirs gets the line of the key that its message is about."""
    try:
        arguments = TrainingArguments(**values)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # fails where the logger's package is not installed
        arguments.get_process_log_level()  # fails for a level that does not exist
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError, KeyError, OSError) as error:
        key = next((key for key in recipe.training if key in str(error)), "")
        key = key or next((key for key, value in recipe.training.items() if f"{value} " in f"{error} "), "")
        written = {key: value for key, value in recipe.training.items() if isinstance(value, str) and value}
        key = key or next((key for key, value in written.items() if value in str(error)), "")
        key = key or ("accelerator_config" if "AcceleratorConfig" in str(error) else "")
        message = str(error).strip().split("\n")[0]
        raise recipe.error(f"training.{key}".rstrip("."), f"training.{key}: {message}".replace(".:", ":")) from None
    return arguments


def check_optimizer(recipe: Recipe, arguments: TrainingArguments, student: Any = None) -> None:
    """Construct the optimizer and the learning-rate schedule once, for a single number.

    Raises:
        RecipeError: for a package that is not installed and options that are refused. Some optimizers need the student
            for this, and are checked only with it.
    """
    parameters = [nn.Parameter(torch.zeros(1))]
    key = "optim"
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
        if "params" in options or "model" in options or "optimizer_dict" in options:
            return
        optimizer = optimizer_class(parameters, **options)
        _check_optim_args(arguments, options)
        key = "lr_scheduler_type"
        given: Any = arguments.lr_scheduler_kwargs or {}
        if not isinstance(given, dict):
            raise TypeError(f"lr_scheduler_kwargs are a mapping, and not {given!r}")
        get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(100), 100, given)
    except (ValueError, TypeError, ImportError, RuntimeError, AssertionError, KeyError) as error:
        message = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        if student is None and "model" in message:
            return
        key = next((name for name in recipe.training if name in message), key)
        raise recipe.error(f"training.{key}", f"training.{key}: {message}") from None


def _check_optim_args(arguments: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Refuse optim_args that this optimizer does not read."""
    for pair in (arguments.optim_args or "").replace(" ", "").split(","):
        name = pair.partition("=")[0]
        if name and name not in options:
            raise ValueError(
                f"optim_args has {name}, which {arguments.optim} does not read; it has {', '.join(options)}"
            )


def gains_from_bf16() -> bool:
    """Does this machine multiply in bfloat16: with a GPU's tensor cores, or a CPU's AVX-512, AMX or SVE?"""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
