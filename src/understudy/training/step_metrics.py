"""What happened since the last log line: seconds by activity, and sums over tokens and responses."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..batch import Batch

_ACTIVITIES = ("generate", "score", "learn")
_COUNTS = ("responses", "tokens", "truncated")


class Window:
    """Counts on every process and closes into one log line for all of them.

    `watched` names the values that `observed` may bring; the same on every process.
    """

    def __init__(self, watched: Sequence[str] = ()) -> None:
        self.watched = tuple(watched)
        self._open()

    def _open(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._sums: dict[str, float] = defaultdict(float)
        self._watched: dict[str, float] = defaultdict(float)  # sums of what was observed …
        self._times: dict[str, int] = defaultdict(int)  # … and how many values there were

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

    def observed(self, values: Mapping[str, torch.Tensor]) -> None:
        """Count values of any shape; their means will be logged."""
        for name, value in values.items():
            self._watched[name] += float(value.sum())
            self._times[name] += value.numel()

    def close(self, accelerator: Any) -> dict[str, float]:
        """The window's log line, over all processes, and a new window.

        Lengths are in tokens; `truncated` is the share of responses cut off by a length limit; what was watched is a
        mean over its values (divergences and entropies: over response tokens, in nats); `tokens_per_second` counts
        response tokens of all processes over wall-clock time. Seconds are the first process's own; `seconds_other` is
        the rest of the time since the last line: optimizer, data, evaluation, checkpoints.
        """
        parts = [(self._sums, _COUNTS), (self._watched, self.watched), (self._times, self.watched)]
        local = [part[name] for part, names in parts for name in names]
        local = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        counts = accelerator.reduce(local, reduction="sum").tolist()
        total = dict(zip(_COUNTS, counts, strict=False))
        sums, times = counts[len(_COUNTS) :][: len(self.watched)], counts[len(_COUNTS) + len(self.watched) :]
        elapsed = time.perf_counter() - self._since
        line = {f"seconds_{activity}": self._seconds[activity] for activity in _ACTIVITIES}
        line["seconds_other"] = elapsed - sum(line.values())
        if total["responses"]:
            line["response_length"] = total["tokens"] / total["responses"]
            line["truncated"] = total["truncated"] / total["responses"]
            line["tokens"] = total["tokens"]
            line["tokens_per_second"] = total["tokens"] / elapsed
        line |= {name: s / n for name, s, n in zip(self.watched, sums, times, strict=True) if n}
        self._open()
        return line


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
