"""Servers for teachers and rollouts outside the process: on the loopback interface, or in this process."""

import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import torch
import uvicorn
from safetensors.torch import load_model

from understudy import Batch, Example, GenerateRollout, Sampling, Step, Teacher
from understudy.serving.app import application
from understudy.serving.scoring import Scorer


def understudy_app(teacher: Teacher, tokenizer: Any, token: str | None = None) -> Any:
    """The web application of `understudy serve`."""
    return application(Scorer(teacher, tokenizer, "tiny", GenerateRollout(), batch_tokens=64), token)


@contextmanager
def understudy_server(teacher: Teacher, tokenizer: Any, token: str | None = None) -> Iterator[str]:
    """The URL of `understudy serve` in a thread."""
    config = uvicorn.Config(understudy_app(teacher, tokenizer, token), log_level="warning", lifespan="off")
    server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class FakeVLLM:
    """Answers as vLLM does, as a handler of httpx's MockTransport; the fields make it another server.

    `shift` reports the distributions of other positions, and `temperature` softens them; `id_of` names tokens.
    """

    teacher: Teacher
    tokenizer: Any
    vocabulary: int
    max_logprobs: int = 20
    shift: int = 0
    temperature: float = 1.0
    noise: float = 0.0
    tokenizes: bool = True
    models: tuple[str, ...] = ("tiny",)
    paths: list[str] = field(default_factory=list)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": name, "max_model_len": 64} for name in self.models]})
        content = json.loads(request.content)
        if request.url.path == "/tokenize":
            tokens = self.tokenizer.encode(content["prompt"], add_special_tokens=content["add_special_tokens"])
            return httpx2.Response(200, json={"tokens": tokens}) if self.tokenizes else httpx2.Response(404)
        if content["prompt_logprobs"] > self.max_logprobs:
            message = f"Requested prompt logprobs of {content['prompt_logprobs']}, which is greater than max allowed"
            return httpx2.Response(400, json={"error": {"message": message, "code": 400}})
        choices = [
            {"index": index, "text": "", "prompt_logprobs": self.entries(ids, content["prompt_logprobs"])}
            for index, ids in enumerate(content["prompt"])
        ]
        return httpx2.Response(200, json={"choices": choices[::-1]})

    def entries(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """None, and for each further position the k likeliest tokens and the one that is there."""
        batch = Batch.from_examples([Example(ids[:1], [*ids[1:], 5])], 0)
        log_probs = (self.teacher.score(batch).cut(self.vocabulary).log_probs / self.temperature).log_softmax(-1)
        log_probs = (log_probs + self.noise * torch.randn_like(log_probs)).log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(ids[1:]):
            row = log_probs[max(0, place + self.shift)]
            tokens = dict.fromkeys([token, *row.topk(k).indices.tolist()])
            entries.append({str(i): {"logprob": float(row[i]), "rank": int((row >= row[i]).sum())} for i in tokens})
        return entries


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
