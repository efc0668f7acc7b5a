"""Servers on the loopback interface, for teachers and rollouts outside the process: top-K scores, and responses."""

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load_model

from understudy import Batch, Example, GenerateRollout, Sampling, Step, Teacher


@contextmanager
def top_k_server(teacher: Teacher) -> Iterator[str]:
    """The URL of a server that scores with `teacher`, in the protocol of examples/http_teacher.py."""

    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps([self.scores(sequence, question["k"]) for sequence in question["sequences"]]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def scores(self, sequence: dict[str, Any], k: int) -> dict[str, Any]:
            with one_at_a_time:  # a model's forward is changed while it is scored
                scores = teacher.score(Batch.from_examples([Example(sequence["prompt"], sequence["response"])], 0))
            values, tokens = scores.log_probs.topk(k)
            return {"tokens": tokens.tolist(), "logprobs": values.tolist(), "chosen": scores.chosen.tolist()}

        def log_message(self, *_: Any) -> None:
            pass

    with _running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def response_server(model: Any, tokenizer: Any) -> Iterator[tuple[int, list[str]]]:
    """The port of a server that generates with `model`, in the protocol of examples/socket_rollout.py.

    With it comes the list of the files of weights that it has loaded, one for each time.
    """
    loaded: list[str] = []
    rollout = GenerateRollout().bind(model, tokenizer)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            question = json.loads(self.rfile.readline())
            self.wfile.write(json.dumps(self.reply(question)).encode() + b"\n")

        def reply(self, question: dict[str, Any]) -> Any:
            if "load" in question:
                load_model(model, question["load"])
                loaded.append(question["load"])
                return True
            prompts = [Example(prompt["prompt"], [], row=prompt["row"]) for prompt in question["prompts"]]
            examples = rollout.generate(prompts, Sampling(**question["sampling"]), Step(**question["step"]))
            return [example.response for example in examples]

    with _running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        yield port, loaded


@contextmanager
def _running(server: Any) -> Iterator[int]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
