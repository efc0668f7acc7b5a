"""A teacher of your own behind HTTP: the top K tokens and the sampled one's log-probability, from a server.

The server answers POST /score with {"sequences": [{"prompt": ids, "response": ids}, …], "k": K} by a list per sequence
of {"tokens": (T, K), "logprobs": (T, K), "chosen": (T,)} for its T response tokens. All batches of an optimizer step
are asked for at once. In a recipe: `teacher: {http_teacher:HTTPTeacher: {url: "http://localhost:8000", k: 20}}`.
"""

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import torch

from understudy import Batch, Capability, Scores, Teacher, TopK


class HTTPTeacher(Teacher):
    """Scores by a server: the top `k` tokens of every position, and the token that is there."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K})

    def __init__(self, url: str, k: int = 20, tokenizer: str | None = None, timeout: float = 60.0, workers: int = 4):
        self.url, self.k, self.timeout = f"{url}/score", k, timeout
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(workers)
        self._pending: dict[int, Future[list[dict[str, Any]]]] = {}

    @property
    def tokenizer_name(self) -> str | None:
        return self._tokenizer

    def prefetch(self, batches: Sequence[Batch]) -> None:
        self._pending = {id(batch): self._pool.submit(self._ask, batch) for batch in batches}

    def score(self, batch: Batch) -> Scores:
        pending = self._pending.pop(id(batch), None)
        replies = self._ask(batch) if pending is None else pending.result()
        rows: dict[str, list[Any]] = {"tokens": [], "logprobs": [], "chosen": []}
        for example, reply in zip(batch.examples, replies, strict=True):
            for name, values in rows.items():
                values += [reply[name][place] for place in example.trained_tokens]
        support, values, chosen = (torch.tensor(rows[name]) for name in ("tokens", "logprobs", "chosen"))
        return Scores(batch.tokens, TopK(values, support, chosen))

    def _ask(self, batch: Batch) -> list[dict[str, Any]]:
        examples = batch.as_read_by_teacher().examples
        sequences = [{"prompt": e.prompt, "response": e.response} for e in examples]
        body = json.dumps({"sequences": sequences, "k": self.k}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.load(reply)
