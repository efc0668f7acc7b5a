"""Metrics between two log lines: seconds by activity, counts of tokens and responses, means of recorded values."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from ..batch import Batch
from ..rollout import WEIGHT_VERSION

_ACTIVITIES = ("generate", "score", "learn")


class StepMetrics:
    """Timers, counts and means on every process, reduced to one log line for all processes."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = dict.fromkeys(_ACTIVITIES, 0.0)
        self._counts: dict[str, float] = dict.fromkeys(("responses", "tokens", "truncated"), 0.0)
        self._sums: dict[str, float] = defaultdict(float)  # of recorded values, by name …
        self._sizes: dict[str, float] = defaultdict(float)  # … and how many values there were

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time this block without the blocks inside it."""
        inner = sum(self._seconds.values())
        start = _now()
        try:
            yield
        finally:
            inner = sum(self._seconds.values()) - inner
            self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start - inner

    def count(self, batch: Batch) -> None:
        """Count a micro-batch's responses and their tokens."""
        self._counts["responses"] += len(batch.examples)
        self._counts["tokens"] += len(batch.tokens)
        self._counts["truncated"] += sum(e.truncated for e in batch.examples)
        generated = [e.columns for e in batch.examples if e.author == "student"]
        versions = [columns[WEIGHT_VERSION] for columns in generated if WEIGHT_VERSION in columns]
        if versions:
            self.record({WEIGHT_VERSION: torch.tensor(versions)})

    def record(self, values: Mapping[str, torch.Tensor]) -> None:
        """Record values of any shape, whose means will be logged. Processes may record different names."""
        for name, value in values.items():
            self._sums[name] += float(value.sum())
            self._sizes[name] += value.numel()

    def log_line(self, accelerator: Any) -> dict[str, float]:
        """The log line of all processes together; then timers, counts and means are reset.

        Lengths are in tokens; `truncated` is the share of responses cut off by a length limit; recorded values are
        means over all their elements (divergences and entropies: over response tokens, in nats); `tokens_per_second`
        counts response tokens of all processes over wall-clock time. Seconds are the first process's own;
        `seconds_other` is the rest of the time since the last line: optimizer, data, evaluation, checkpoints.
        """
        parts = [(dict(self._counts), dict(self._sums), dict(self._sizes))]
        if accelerator.num_processes > 1:
            parts = gather_object(parts)
        counts, sums, sizes = (_add(dicts) for dicts in zip(*parts, strict=True))
        elapsed = time.perf_counter() - self._start
        line = {f"seconds_{activity}": seconds for activity, seconds in self._seconds.items()}
        line["seconds_other"] = elapsed - sum(line.values())
        if counts["responses"]:
            line["response_length"] = counts["tokens"] / counts["responses"]
            line["truncated"] = counts["truncated"] / counts["responses"]
            line["tokens"] = counts["tokens"]
            line["tokens_per_second"] = counts["tokens"] / elapsed
        line |= {name: sums[name] / size for name, size in sizes.items() if size}
        self._reset()
        return line


def _add(dicts: tuple[dict[str, float], ...]) -> dict[str, float]:
    """The sums by name, over all dictionaries that have it."""
    total: dict[str, float] = defaultdict(float)
    for part in dicts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
