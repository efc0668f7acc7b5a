"""What happened since the last log line: seconds by activity, and sums over tokens and responses."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .batch import Batch

_ACTIVITIES = ("generate", "score", "learn")
_TOKEN_MEANS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
_SUMS = ("responses", "tokens", "truncated", "compared", *_TOKEN_MEANS)


class Window:
    """Counts on every process and closes into one log line for all of them."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._sums: dict[str, float] = defaultdict(float)

    @contextmanager
    def spent(self, activity: str) -> Iterator[None]:
        """Book the time of this block on `activity`, less what inner blocks book on theirs."""
        inner = sum(self._seconds.values())
        start = _now()
        try:
            yield
        finally:
            inner = sum(self._seconds.values()) - inner
            self._seconds[activity] += _now() - start - inner

    def saw(self, batch: Batch) -> None:
        """Count a micro-batch's responses."""
        self._sums["responses"] += len(batch.examples)
        self._sums["tokens"] += len(batch.tokens)
        self._sums["truncated"] += sum(e.truncated for e in batch.examples)

    def compared(self, comparison: dict[str, torch.Tensor]) -> None:
        """Count token values of `scores.compare`."""
        self._sums["compared"] += len(comparison["forward_kl"])
        for name in _TOKEN_MEANS:
            self._sums[name] += float(comparison[name].sum())

    def close(self, accelerator: Any) -> dict[str, float]:
        """The window's log line, over all processes, and a new window.

        Lengths are in tokens; `truncated` is the share of responses cut off by a length limit; divergences and
        entropies are means over response tokens in nats; `tokens_per_second` counts response tokens of all processes
        over wall-clock time. Seconds are the first process's own; `seconds_other` is the rest of the time since the
        last line: optimizer, data, evaluation, checkpoints.
        """
        local = torch.tensor([self._sums[name] for name in _SUMS], dtype=torch.float64, device=accelerator.device)
        total = dict(zip(_SUMS, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        elapsed = time.perf_counter() - self._since
        line = {f"seconds_{activity}": self._seconds[activity] for activity in _ACTIVITIES}
        line["seconds_other"] = elapsed - sum(line.values())
        if total["responses"]:
            line["response_length"] = total["tokens"] / total["responses"]
            line["truncated"] = total["truncated"] / total["responses"]
            line["tokens"] = total["tokens"]
            line["tokens_per_second"] = total["tokens"] / elapsed
        if total["compared"]:
            line |= {name: total[name] / total["compared"] for name in _TOKEN_MEANS}
        self._open()
        return line


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
