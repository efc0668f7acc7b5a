"""What experiment loggers (W&B, trackio, TensorBoard, MLflow …) are told about a run besides TrainingArguments."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from ..reward import Reward
from ..teacher import Teacher

_LOGGERS = "transformers.integrations"  # the package of transformers' loggers


def describe_to_loggers(callbacks: Sequence[Any], parts: Mapping[str, Any], output_dir: str) -> None:
    """Add the run's `parts`, such as its method, to the arguments that loggers save, under the key "distillation".

    A run without a name gets one of its folder and the time, so that a logger that closes its run at the end of
    training (trackio) continues the same one when the student is evaluated afterwards.
    """
    folder = Path(output_dir).as_posix().strip("/").replace("/", "-")
    run_name = f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}"
    description = {name: _plain(part) for name, part in parts.items() if part is not None}
    for callback in callbacks:
        if any(cls.__module__.startswith(_LOGGERS) for cls in type(callback).__mro__):
            start = "setup" if hasattr(callback, "setup") else "on_train_begin"
            setattr(callback, start, partial(_call, getattr(callback, start), description, run_name))


def _call(function: Any, description: Mapping[str, Any], run_name: str, args: Any, *others: Any, **named: Any) -> Any:
    described = copy(args)
    described.run_name = args.run_name or run_name
    described.to_dict = lambda: {**args.to_dict(), "run_name": described.run_name, "distillation": dict(description)}
    return function(described, *others, **named)


def _plain(value: Any) -> Any:
    """A value of JSON; an object is {its class: its fields}."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Reward):
        return {**{name: weight for name, (_, weight) in value.functions.items()}, "normalize": value.normalize}
    if isinstance(value, Teacher):
        name = value.model_name or getattr(getattr(value.model, "config", None), "name_or_path", None)
        return {type(value).__name__: {"model": name or None}}
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {type(value).__name__: {name: _plain(getattr(value, name)) for name in fields}}
    return type(value).__name__
