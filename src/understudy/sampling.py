"""Sampling parameters of generated text, and how training uses a rollout: ahead of the step, truncated responses."""

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


@dataclass(frozen=True)
class Schedule:
    """How training uses the rollout: one step ahead or not, and how many tokens of a response are trained on.

    With a `prefix` training sees only the first so many tokens of every generated response, and generates no more of
    them where no reward reads the rest. With `prefix_start` this limit rises linearly, from `prefix_start` at the first
    step to `prefix` (default: the sampling's `max_new_tokens`) at the last. Evaluation is not affected.

    Raises:
        ValueError: for a value out of range.
    """

    ahead: int = 0  # 1: generate the next step's responses while this step is learned from
    prefix: int | None = None  # trained tokens of a response
    prefix_start: int | None = None  # the same at the first step

    def __post_init__(self) -> None:
        if self.ahead not in (0, 1):
            raise ValueError(f"responses are generated at most one step ahead: set ahead to 0 or 1, not {self.ahead}")
        for name in ("prefix", "prefix_start"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"the rollout needs {name} >= 1, not {value}")

    def check(self, sampling: Sampling) -> None:
        """Refuse lengths that would have no effect.

        Raises:
            ValueError: naming them.
        """
        end = sampling.max_new_tokens if self.prefix is None else self.prefix
        if end > sampling.max_new_tokens:
            raise ValueError(
                f"no response is longer than max_new_tokens, {sampling.max_new_tokens}, so a prefix of {end} has no "
                "effect: lower prefix, or raise max_new_tokens"
            )
        if self.prefix_start is not None and self.prefix_start > end:
            name = "max_new_tokens" if self.prefix is None else "prefix"
            raise ValueError(
                f"the trained tokens rise from prefix_start, {self.prefix_start}, to {name}, {end}: lower prefix_start"
            )

    @property
    def truncates(self) -> bool:
        """Is there a limit of trained tokens?"""
        return self.prefix is not None or self.prefix_start is not None

    def limit(self, step: int, total: int, max_new_tokens: int) -> int:
        """The trained tokens of a response at step `step` (from 0) of `total`: a + (b − a) · step/(total − 1), rounded.

        a is `prefix_start`, b is `prefix` or `max_new_tokens`; without `prefix_start` it is b throughout.
        """
        end = max_new_tokens if self.prefix is None else self.prefix
        if self.prefix_start is None or total < 2:
            return end
        return round(self.prefix_start + (end - self.prefix_start) * min(1.0, step / (total - 1)))
