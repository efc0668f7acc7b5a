"""A teacher behind HTTP for tests: a server of log-probabilities of response tokens, and the teacher that asks it."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any, ClassVar

import torch
from torch import Tensor

from understudy.batch import Batch, Example
from understudy.fused_linear.distributions import TopK
from understudy.scores import Scores
from understudy.teacher import Capability, Teacher


@contextmanager
def serve(teacher: Teacher) -> Iterator[int]:
    """Serve the scores of `teacher` on 127.0.0.1, one request at a time, at the port that this gives.

    A request is {"prompt": ids, "response": ids, "k": K}, and the reply for the response's T tokens
    {"log_probs": (T, K), "tokens": (T, K), "chosen": (T,)}.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = teacher.score(Batch.from_examples([Example(request["prompt"], request["response"])], pad=0))
            log_probs, tokens = (x.tolist() for x in scores.log_probs.topk(request["k"]))
            reply = {"log_probs": log_probs, "tokens": tokens, "chosen": scores.chosen.tolist()}
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: requests are not worth a line of a test's output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class ServerTeacher(Teacher):
    """A teacher whose scores come from `serve`, an example per request; those of a prefetched batch wait together."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K})

    def __init__(self, port: int, k: int = 5) -> None:
        self.port, self.k = port, k
        self.requests = 0  # sent so far
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._replies: dict[tuple[tuple[int, ...], ...], Future[dict[str, Any]]] = {}

    def prefetch(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for example in batch.as_read_by_teacher().examples:
                if _key(example) not in self._replies:
                    self._replies[_key(example)] = self._pool.submit(self._ask, example)

    def score(self, batch: Batch) -> Scores:
        self.prefetch([batch])
        examples = batch.as_read_by_teacher().examples
        replies = [self._replies[_key(example)].result() for example in examples]
        for example in examples:
            self._replies.pop(_key(example), None)
        pairs = list(zip(examples, replies, strict=True))

        def rows(name: str) -> Tensor:
            return torch.tensor([reply[name][place] for example, reply in pairs for place in example.trained_tokens])

        return Scores(batch.tokens, TopK(rows("log_probs"), rows("tokens"), rows("chosen")))

    def _ask(self, example: Example) -> dict[str, Any]:
        self.requests += 1
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = json.dumps({"prompt": example.prompt, "response": example.response, "k": self.k})
            connection.request("POST", "/", body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def _key(example: Example) -> tuple[tuple[int, ...], ...]:
    return tuple(example.prompt), tuple(example.response)
