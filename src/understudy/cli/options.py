"""Options that several commands share, and how their texts are read."""

import logging
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import is_first_process

Recipe = Annotated[Path, typer.Argument(help="A recipe: a file, or a name such as playground/gkd.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as training.max_steps=100.")
]
Split = Annotated[str, typer.Option(help="The dataset's split to evaluate on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N rows.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="A further metric, such as rouge_l, bleu or chrf.")]
LengthBuckets = Annotated[
    str, typer.Option(help="Metrics also by the reference's length: 8,20 for up to 8, 9 to 20 and more tokens.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="The longest response; by default 256, or half of the model's context length."),
]
MaxPromptLength = Annotated[
    int | None, typer.Option(min=1, help="The longest prompt; longer ones lose their beginning.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Delete the earlier run in the folder and begin again.")]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        min=0,
        help="Evaluate at this temperature, or several; 0 is greedy.",
        callback=lambda values: finite(values),
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="0 is greedy.", show_default=False, callback=lambda value: finite(value)),
]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", min=0, help="Seed of sampling; several for several responses.")
]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="The data's own column names, such as completion=de.")
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(help="Arguments of the chat template, such as '{enable_thinking: false}'.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Responses generated at once; by default the fastest number is found.")
]


def finite(value: Any) -> Any:
    """A callback that refuses numbers that are not finite, which no bound excludes."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def column(text: str) -> tuple[str, str]:
    """The two names of `--column completion=de`."""
    name, separator, own_name = text.partition("=")
    if not separator or not name or not own_name:
        raise ValueError(f"--column {text} should be column=name, such as completion=de")
    return name, own_name


def bounds(text: str) -> tuple[int, ...]:
    """The bounds of `--length-buckets`: rising numbers of tokens."""
    try:
        return tuple(int(part) for part in text.split(",") if text)
    except ValueError:
        raise ValueError(f"--length-buckets {text} should be numbers of tokens, such as 8,20") from None


def mapping(option: str, text: str | None) -> dict[str, Any] | None:
    """The mapping that an option's text is, in YAML or JSON."""
    from ..recipe.yaml_text import value_of

    value = None if text is None else value_of(text)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{option} {text} should be a mapping, such as '{{enable_thinking: false}}'")
    return value


def teacher(text: str | None) -> str | dict[str, Any] | None:
    """The teacher of `--teacher`: a name, or a block in braces."""
    return mapping("--teacher", text) if text is not None and text.startswith("{") else text


def sampling(protocol: str, temperature: float | None, seeds: list[int] | None) -> dict[str, Any]:
    """The settings of a protocol, with the options that change them."""
    from ..evaluation.settings import protocol as protocol_settings

    changes = set_options(temperature=temperature, seeds=tuple(seeds) if seeds else None)
    return {**protocol_settings(protocol), **changes}


def set_options(**options: Any) -> dict[str, Any]:
    """The options that were set on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def quiet() -> None:
    """Show only warnings of libraries, and none of their progress bars; of understudy also information."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("understudy").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
