"""Load a model's weights from a folder or the hub, and refuse a checkpoint that lacks some of them."""

import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from .origin import tokens_of_invalid_config

logger = logging.getLogger(__name__)


def load_weights(auto_class: Any, path: str, trainable: bool = False, **options: Any) -> Any:
    """A model of `auto_class` from a folder or name, which may hold adapters, with all of its weights.

    transformers draws weights that a checkpoint lacks at random, and only logs it. Adapters are loaded with PEFT on top
    of the model that they name.

    Args:
        trainable: of adapters; otherwise they are frozen.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: naming the weights that are missing, or not used although the module that they belong to exists.
    """
    adapters = adapter_config(path, options.get("revision"))
    if adapters is None:
        return _complete(auto_class, path, (), options)
    from peft import PeftModel

    below = {name: value for name, value in options.items() if name != "revision"}
    base = _complete(auto_class, adapters["base_model_name_or_path"], _saved_modules(adapters), below)
    if (Path(path) / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        revision = {"revision": options["revision"]} if "revision" in options else {}
        model = PeftModel.from_pretrained(base, path, is_trainable=trainable, **revision)
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"the file of adapters is incomplete: {warning.message}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def adapter_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """The content of adapter_config.json of adapters by folder or name; None for a model.

    Raises:
        ValueError: if it does not name the model below the adapters.
    """
    if Path(path).is_dir():
        file = Path(path) / "adapter_config.json"
        place = str(file) if file.is_file() else None
    else:
        place = find_adapter_config_file(path, revision=revision)
    if place is None:
        return None
    content = json.loads(Path(place).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("base_model_name_or_path"), str):
        raise ValueError("its adapter_config.json does not name the model below the adapters")
    return content


def _complete(auto_class: Any, path: str, elsewhere: Iterable[str], options: dict[str, Any]) -> Any:
    """The model, if none of its weights is missing; those of the modules named `elsewhere` may be."""
    # An absolute path, because adapters save the path of the model below them.
    place = Path(path).resolve() if Path(path).is_dir() else path
    try:
        model, report = auto_class.from_pretrained(place, output_loading_info=True, **options)
    except ValueError:
        if (generation := tokens_of_invalid_config(str(place))) is None:
            raise
        model, report = auto_class.from_pretrained(
            place, output_loading_info=True, generation_config=generation, **options
        )
    buffers = {name for name, _ in model.named_buffers()}
    missing = {name for name in report["missing_keys"] if not set(name.split(".")) & set(elsewhere)}
    unexpected = sorted(report["unexpected_keys"])
    misplaced = [] if getattr(model, "hf_quantizer", None) else [name for name in unexpected if _has_place(model, name)]
    refused = sorted(missing - buffers)
    if refused or misplaced:
        parts = [f"{len(refused)} weights are missing ({_some(refused)})"] if refused else []
        parts += [f"{len(unexpected)} weights belong to no part of it ({_some(unexpected)})"] if unexpected else []
        raise ValueError(f"its configuration and its weights do not fit together: {' and '.join(parts)}")
    if missing or unexpected:
        lacks = f"lacks the buffers {_some(sorted(missing))}" if missing else ""
        surplus = f"has weights that the model does not use: {_some(unexpected)}" if unexpected else ""
        logger.warning("the checkpoint of %s %s", path, " and ".join(filter(None, (lacks, surplus))))
    return model


def _has_place(model: Any, name: str) -> bool:
    """Is this weight one of a module of the model, which would compute something else with it?

    A buffer that older versions saved is not.
    """
    owner, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    return module is not None and leaf in ("weight", "bias") and any(True for _ in module.parameters(recurse=False))


def _saved_modules(adapters: dict[str, Any]) -> tuple[str, ...]:
    """The modules whose weights are saved with the adapters, as PEFT names them by default for a classifier."""
    default = ("classifier", "score") if adapters.get("task_type") == "SEQ_CLS" else ()
    return tuple(adapters.get("modules_to_save") or default)


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")
