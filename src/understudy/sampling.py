"""Sampling parameters: length, temperature, top-k, top-p, number of responses and stop tokens of generated text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Sample from softmax(logits / temperature), restricted to the top k tokens, then to the top-p set.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    n: int = 1  # responses per prompt
    stop_ids: tuple[int, ...] = ()  # default: the end-of-sequence ids of tokenizer, chat template and model
    logprobs: bool = False  # return the stream `sampled_logprob`, the model's own log-probabilities at temperature 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling needs {name} >= 1, not {getattr(self, name)}")
        for name in ("temperature", "top_k"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"sampling needs {name} >= 0, not {getattr(self, name):g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling needs top_p in (0, 1], not {self.top_p:g}")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
