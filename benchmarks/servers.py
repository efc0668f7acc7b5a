"""What a teacher behind HTTP adds to a step: `understudy serve` and vLLM against the local teacher, on the same work.

What is timed: the teacher's part alone, and a whole step with it (scores, forward, loss and gradients of a student of
2 layers of 128, AdamW), of 4 micro-batches of 8 sequences of 32 + 64 tokens. Servers are processes of their own on this
machine, with one thread each, as is the student's; float32. `bytes/token` is what is received per response token.

    python -m benchmarks.servers            vLLM takes part where `make engines` has installed it

TinyStories-656K, which lies beside the repository, is served with heads of 32 dimensions instead of 16, which vLLM's
CPU kernels lack; its logits are the same.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoTokenizer

from tests.engines import ROOT, TINYSTORIES, vllm_server, with_wider_heads
from understudy import Batch, Example, ForwardKL, LocalTeacher, Teacher
from understudy.models.forward import score
from understudy.models.load import load_model, load_tokenizer
from understudy.teachers.server import ServerTeacher

from .measure import Stopwatch, alternate, save, table
from .models import llama

PARTS, ROWS, PROMPT, RESPONSE, TOP_K = 4, 8, 32, 64, 20
LENGTH = PROMPT + RESPONSE


class Counting(httpx2.AsyncHTTPTransport):
    """Counts the bytes of the replies."""

    received = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        self.received += int(response.headers["content-length"])
        return response


def models(folder: Path) -> dict[str, Path]:
    """The folders of the teachers, in float32."""
    arithmetic = folder / "arithmetic"
    load_model("playground:arithmetic", dtype="float32").save_pretrained(arithmetic)
    load_tokenizer("playground:arithmetic").save_pretrained(arithmetic)
    stories = {"TinyStories-656K": with_wider_heads(TINYSTORIES, folder / "stories")} if TINYSTORIES.is_dir() else {}
    return {"playground:arithmetic": arithmetic, **stories}


@contextmanager
def understudy_server(model: Path, log: Path) -> Iterator[str]:
    """The URL of `understudy serve` in a process of its own."""
    port = 8975
    command = [sys.executable, "-m", "understudy", "serve", str(model), "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(600):
                try:
                    httpx2.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx2.RequestError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def batches(vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (PARTS, ROWS, LENGTH), generator=generator).tolist()
    return [Batch.from_examples([Example(r[:PROMPT], r[PROMPT:], row=i) for i, r in enumerate(p)], 0) for p in ids]


def ask(teacher: Teacher, work: list[Batch]) -> None:
    """The teacher's part of a step."""
    teacher.prefetch(work)
    for batch in work:
        teacher.score(batch)


def step(teacher: Teacher, work: list[Batch], student: Any, optimizer: Any, vocabulary: int) -> None:
    """One optimizer step."""
    teacher.prefetch(work)
    for batch in work:
        scores = teacher.score(batch).cut(vocabulary)
        score(student, batch, lambda q, p=scores: p.divergence_to(q, ForwardKL()).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def case(folder: Path, logs: Path) -> dict[str, dict[str, Any]]:
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(folder), load_model(str(folder)).config.vocab_size
    work = batches(vocabulary)
    with ExitStack() as stack:
        served = stack.enter_context(understudy_server(folder, logs / "understudy.log"))
        urls: dict[str, tuple[str, dict[str, Any]]] = {
            "understudy serve, hidden rows": (served, {}),
            f"understudy serve, top {TOP_K}": (served, {"top_k": TOP_K}),
        }
        if (ROOT / ".venv-engines" / ".ready").is_file():
            vllm = stack.enter_context(vllm_server(folder, logs / "vllm.log", enforce_eager=True))
            urls[f"vLLM, top {TOP_K}"] = (vllm.url, {"protocol": "vllm", "top_k": TOP_K})
        else:
            print("vLLM is not installed: `make engines` installs it")
        counters = {name: Counting() for name in urls}
        teachers: dict[str, Teacher] = {"local": LocalTeacher(str(folder))}
        for name, (url, options) in urls.items():
            teachers[name] = ServerTeacher(url, _transport=counters[name], **options)
        for teacher in teachers.values():
            teacher.setup(tokenizer)
        return _measure(teachers, counters, work, vocabulary)


def _measure(
    teachers: dict[str, Teacher], counters: dict[str, Counting], work: list[Batch], vocabulary: int
) -> dict[str, dict[str, Any]]:
    asking: dict[str, Callable[[], None]] = {}
    stepping: dict[str, Callable[[], None]] = {}
    for name, teacher in teachers.items():
        student = llama(vocabulary, 128, 2, seed=1)
        optimizer = torch.optim.AdamW(student.parameters())
        asking[name] = partial(ask, teacher, work)
        stepping[name] = partial(step, teacher, work, student, optimizer, vocabulary)
    alternate(stepping, 2)  # warms up
    before = {name: counter.received for name, counter in counters.items()}
    rounds = 15
    alone = alternate(asking, rounds)
    received = {name: counters[name].received - before[name] for name in counters}
    whole = alternate(stepping, rounds)
    tokens = rounds * PARTS * ROWS * RESPONSE
    return {
        name: {
            "teacher_ms": 1000 * alone[name].summary(alone["local"])["median"],
            "step_ms": 1000 * whole[name].summary(whole["local"])["median"],
            "ratio": whole[name].summary(whole["local"])["ratio"],
            "added_ms": 1000 * _difference(whole[name], whole["local"]),
            "bytes/token": received[name] / tokens if name in received else 0.0,
        }
        for name in teachers
    }


def _difference(one: Stopwatch, base: Stopwatch) -> float:
    """The median of the differences of neighbouring measurements, seconds."""
    return float(torch.tensor(one.wall).sub(torch.tensor(base.wall)).median())


def main() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models(Path(folder)).items():
            results[name] = case(path, Path(folder))
            table(f"{name}: {PARTS} micro-batches of {ROWS} × {RESPONSE} response tokens", results[name])
    save("servers", {"steps": results})


if __name__ == "__main__":
    main()
