"""What a student came with and training changes: dtype, use_cache, generation config. It is restored when saved."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

logger = logging.getLogger(__name__)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def repair_generation_config(model: Any) -> None:
    """Set fields of the model's generation config that transformers would refuse to save to their defaults.

    Such as a temperature without sampling. Each change is logged as a warning.
    """
    config = getattr(model, "generation_config", None)
    if config is None or (error := _error(config)) is None:
        return
    default = GenerationConfig()
    for name in re.findall(r"^- `(\w+)`", str(error), re.MULTILINE):
        logger.warning(
            "the student's generation_config has %s: %r, which has no effect with its other fields and cannot be "
            "saved: it is left out",
            name,
            getattr(config, name),
        )
        setattr(config, name, getattr(default, name, None))


def tokens_of_invalid_config(path: str) -> GenerationConfig | None:
    """A generation config with the tokens of the one in a folder or repository, if that one cannot be loaded.

    This is logged as a warning. None if it can be loaded, or if there is none.
    """
    try:
        GenerationConfig.from_pretrained(path)
    except ValueError as error:
        file = cached_file(path, "generation_config.json")
        assert file is not None
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        logger.warning("the generation_config of %s is invalid, and only its tokens are used: %s", path, error)
        return GenerationConfig(**{name: content[name] for name in _TOKENS if name in content})
    except OSError:
        pass
    return None


def _error(config: GenerationConfig) -> ValueError | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return error
    return None


@dataclass(frozen=True)
class Origin:
    """What a student came with.

    Args:
        dtype: of the weights that it was loaded from; None for new weights.
        use_cache: of its configuration.
    """

    dtype: torch.dtype | None
    use_cache: bool | None

    @classmethod
    def of(cls, dtype: torch.dtype | str | None, model: Any) -> "Origin":
        """Of a student that was just loaded from weights with this dtype."""
        known: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls(known, getattr(model.config, "use_cache", None))

    def restore(self, model: Any, save_dtype: str, stop_ids: Sequence[int], pad_id: int | None) -> None:
        """Change a trained model without adapters to what is saved.

        Its dtype is `save_dtype`, or the one that it came in where it was converted to a wider one for training;
        `generate` stops where evaluation stopped.
        """
        self.restore_settings(model, stop_ids, pad_id)
        dtype = self.dtype if save_dtype == "auto" else getattr(torch, save_dtype)
        if dtype is not None and (save_dtype != "auto" or dtype.itemsize < model.dtype.itemsize):
            _convert(model, dtype)

    def restore_settings(self, model: Any, stop_ids: Sequence[int], pad_id: int | None) -> None:
        """Set `use_cache` as it was, and the stop tokens of the evaluation."""
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache
        config = getattr(model, "generation_config", None)
        if config is not None and stop_ids:
            config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
        if config is not None and pad_id is not None:
            config.pad_token_id = pad_id


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert floating-point weights in place, except those that the model wants in float32."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(model, attribute, None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not names & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
