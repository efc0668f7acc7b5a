"""How answers are sampled when a model is judged: greedily, or as the distillation papers do."""

from dataclasses import dataclass, replace
from typing import Any

from ..registry import nearest


@dataclass(frozen=True)
class Protocol:
    """Temperature, seeds and lengths; None leaves a length to the model's window."""

    temperature: float = 0.0  # 0 is greedy
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int | None = None
    max_prompt_length: int | None = None  # longer prompts keep their end

    def but(self, **changes: Any) -> "Protocol":
        """The same with those `changes` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


PROTOCOLS = {
    "greedy": Protocol(),
    # MiniLLM, DistiLLM, PromptKD and DPKD: sequences of 512 tokens, of which prompts have up to 256.
    "minillm": Protocol(temperature=1.0, seeds=(10, 20, 30, 40, 50), max_new_tokens=256, max_prompt_length=256),
}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f'there is no protocol "{name}"{nearest(name, PROTOCOLS)}')
    return PROTOCOLS[name]
