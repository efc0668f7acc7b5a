"""A fake vLLM that generates: it speaks the schema of vLLM's server, with weights that it loads from folders.

It answers as a handler of httpx's MockTransport, or as a program in the place of vLLM's server. Tokens are drawn from
the model by a stream of the request's seed, and do not depend on what else is asked.
"""

import copy
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import httpx2
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from understudy.generation.sampling import draw, log_probs_of
from understudy.sampling import Sampling


@dataclass
class FakeVLLMEngine:
    """Answers the requests of rollout vllm; the fields make it another server.

    Args:
        stale: says that it has loaded weights, and keeps those before (as vLLM does with a tied head).
        dies_after: ends at this many requests for responses, once; it is back at the next one, without weights.
        missing: paths that it does not have.
        base: the model below adapters; None: it is in the folder beside theirs, as for a server that was started.
    """

    stale: bool = False
    dies_after: int | None = None
    missing: tuple[str, ...] = ()
    model: Any = None
    base: Any = None
    adapters: dict[str, Any] = field(default_factory=dict)
    version: str = "default"
    loads: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        content = json.loads(request.content) if request.content else {}
        routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/health": lambda _: {},
            "/v1/models": lambda _: {"object": "list", "data": [{"id": "student", "max_model_len": 64}]},
            "/weight_info": lambda _: {"weight_version": self.version},
            "/update_weight_version": self.name_weights,
            "/reset_prefix_cache": lambda _: {"success": True},
            "/collective_rpc": self.reload,
            "/v1/load_lora_adapter": self.load_adapters,
            "/v1/unload_lora_adapter": lambda content: self.adapters.pop(content["lora_name"], None) and "Success",
            "/v1/completions": self.complete,
        }
        if path not in routes or path in self.missing:
            return httpx2.Response(404, json={"detail": "Not Found"})
        if path == "/v1/completions" and self.dies_after is not None and len(self.asked) >= self.dies_after:
            self.dies_after, self.version, self.adapters = None, "default", {}
            self.model = None
            raise httpx2.ReadError("it has ended", request=request)
        answer = routes[path](content)
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)

    def name_weights(self, content: dict[str, Any]) -> dict[str, Any]:
        self.version = content["new_version"]
        return {"success": True, "new_version": self.version}

    def reload(self, content: dict[str, Any]) -> dict[str, Any]:
        assert content["method"] == "reload_weights"
        self.loads += 1
        if self.model is None or not self.stale:
            folder = Path(content["kwargs"]["weights_path"])
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return {"results": [None]}

    def load_adapters(self, content: dict[str, Any]) -> Any:
        from peft import PeftModel

        folder = Path(content["lora_path"]).parent / "model"
        base = copy.deepcopy(self.base) or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.adapters[content["lora_name"]] = PeftModel.from_pretrained(base, content["lora_path"]).eval()
        self.loads += 1
        return "Success"

    def complete(self, content: dict[str, Any]) -> Any:
        self.asked.append(content)
        model = self.adapters.get(content["model"], self.model if content["model"] == "student" else None)
        if model is None:
            message = f"The model `{content['model']}` does not exist."
            return httpx2.Response(404, json={"error": {"message": message, "type": "NotFoundError", "code": 404}})
        tokens, log_probs = self.respond(model, content)
        names = [f"token_id:{token}" for token in tokens]
        with_log_probs = {"token_logprobs": log_probs, "tokens": names} if "logprobs" in content else None
        reason = "stop" if tokens[-1] in content["stop_token_ids"] else "length"
        choice = {"index": 0, "text": "", "token_ids": tokens, "logprobs": with_log_probs, "finish_reason": reason}
        return {"object": "text_completion", "model": content["model"], "choices": [choice]}

    @torch.no_grad()
    def respond(self, model: Any, content: dict[str, Any]) -> tuple[list[int], list[float]]:
        sampling = Sampling(content["max_tokens"], content["temperature"], content["top_k"], content["top_p"])
        uniforms = torch.rand(
            sampling.max_new_tokens,
            generator=torch.Generator().manual_seed(content["seed"]),
            dtype=torch.float64,
        )
        tokens: list[int] = []
        log_probs: list[float] = []
        for uniform in uniforms:
            logits: Tensor = model(torch.tensor([content["prompt"] + tokens])).logits[:, -1].float()
            biased = logits.clone()
            for token, bias in content.get("logit_bias", {}).items():
                biased[:, int(token)] += bias
            token = draw(biased, uniform[None], sampling)
            tokens.append(int(token))
            log_probs.append(float(log_probs_of(logits, token)))
            if tokens[-1] in content["stop_token_ids"]:
                break
        return tokens, log_probs


def interpreter(folder: Path) -> str:
    """What can stand for `python` of rollout vllm: runs this file in the place of vLLM's server."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    path.chmod(0o755)
    return str(path)


def server_of(engine: FakeVLLMEngine, port: int = 0) -> ThreadingHTTPServer:
    """An HTTP server on the loopback interface, by default at a free port."""
    one_at_a_time = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            with one_at_a_time:
                answer = engine(httpx2.Request(self.command, f"http://localhost{self.path}", content=content))
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


@contextmanager
def served(engine: FakeVLLMEngine) -> Iterator[str]:
    """The URL of a server in a thread of this process."""
    with server_of(engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":  # until the process is ended; its number is in the log, by which tests end it
    torch.set_num_threads(1)
    print(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:]}), flush=True)
    server_of(FakeVLLMEngine(), int(sys.argv[sys.argv.index("--port") + 1])).serve_forever()
