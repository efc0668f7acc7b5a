"""What rollout vllm costs in a step: sending the student's weights by files, and generating, beside `generate`.

What is timed: responses of 64 tokens to 16 prompts of 32, temperature 1, of Llamas with random weights in float32. vLLM
is a server that the rollout starts, with one thread, as the student's process has; the two take turns. `write` is the
folder in memory, `load` is vLLM's `reload_weights` with the cache reset and the version; both are once a step.

    python -m benchmarks.vllm_rollout        where `make engines` has installed vLLM
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.engines import SETTINGS, engine_python
from understudy import GenerateRollout, Sampling, Step
from understudy.rollouts.vllm import VLLMRollout

from .measure import Stopwatch, save, table
from .models import llama, prompts, words

ROWS, PROMPT, RESPONSE, ROUNDS = 16, 32, 64, 9
MODELS = {"1 million parameters": (4096, 128, 2), "50 million parameters": (32_000, 512, 8)}


def case(vocabulary: int, width: int, layers: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of a step by what is done in it."""
    model, tokenizer, examples = llama(vocabulary, width, layers), words(vocabulary), prompts(ROWS, PROMPT, vocabulary)
    sampling = Sampling(RESPONSE, stop_ids=(2,))  # which hardly ever comes
    vllm = VLLMRollout(start=True, python=engine_python(), env=SETTINGS, options={"enforce_eager": True})
    vllm.setup(folder)
    served = vllm.bind(model, tokenizer)
    assert isinstance(served, VLLMRollout)
    own, engine = GenerateRollout().bind(model, tokenizer), served._engine
    watches: dict[str, Stopwatch] = {}
    for number in range(ROUNDS + 2):
        if number == 2:  # the server is there, and was compared with the student twice
            watches = {name: Stopwatch() for name in ("generate", "vllm, generating", "vllm, write", "vllm, load")}
        step = Step(number)
        served.sync(step)
        work = {
            "generate": partial(own.generate, examples, sampling, step),
            "vllm, write": engine.write,
            "vllm, load": engine.prepare,
            "vllm, generating": partial(served.generate, examples, sampling, step),
        }
        for name, call in work.items():
            watches.get(name, Stopwatch()).time(call)
    return {name: {"ms": 1000 * watch.summary(watch)["median"]} for name, watch in watches.items()}


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = case(*shape, Path(folder))
        table(f"{name}: {ROWS} × {RESPONSE} tokens", results[name])
    save("vllm_rollout", {"steps": results})


if __name__ == "__main__":
    main()
