"""Evaluation settings: data, sampling, lengths and metrics in one value; protocols of the literature by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..recipe import Data
from ..registry import nearest


@dataclass(frozen=True)
class EvalSettings:
    """Everything besides the model that an evaluation's metrics depend on; equal settings make models comparable.

    By default lengths are derived from the models' context length.
    """

    data: Data  # the rows; its lengths are not used
    temperature: float = 0.0  # 0 is greedy
    seeds: tuple[int, ...] = (0,)  # every prompt gets one response for each
    max_new_tokens: int | None = None
    max_prompt_length: int | None = None  # longer prompts lose their beginning
    metrics: tuple[str, ...] = ()  # of the folder metrics/, besides accuracy, lengths and truncation
    length_buckets: tuple[int, ...] = ()  # bounds of the references' lengths, by which the metrics are also computed
    teacher: str | Mapping[str, Any] | None = None  # a name or folder, or a recipe's block; to measure the distance to
    exposure_bias: bool = False  # generate responses of the teacher as well
    batch_size: int | None = None  # responses generated at once; None: search for the fastest number
    dtype: str = "auto"  # of the model; auto is that of its weights

    def changed(self, **changes: Any) -> "EvalSettings":
        """The same with those `changes` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON, without `batch_size`, which depends on the machine."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("data", "batch_size")}
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"data": self.data.model_dump(exclude_defaults=True), **fields}


# Sampling settings by name: temperature, seeds and lengths.
PROTOCOLS: dict[str, Mapping[str, Any]] = {
    "greedy": {},
    # MiniLLM, DistiLLM, PromptKD and DPKD: sequences of 512 tokens, of which prompts have up to 256.
    "minillm": {"temperature": 1.0, "seeds": (10, 20, 30, 40, 50), "max_new_tokens": 256, "max_prompt_length": 256},
}


def protocol(name: str) -> Mapping[str, Any]:
    """The fields of `EvalSettings` that a protocol sets.

    Raises:
        ValueError: if there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f'there is no protocol "{name}"{nearest(name, PROTOCOLS)}')
    return PROTOCOLS[name]
