"""The tables of docs/performance.md for a GPU: loss, decoding, a whole step, three methods, and their memory.

    make bench-gpu                          # on a machine with a CUDA device; results/gpu.json
    python -m benchmarks.gpu --tiny         # a dry run on tiny shapes, on the CPU too: that everything runs

Weights are random, because speed does not depend on them, and in bfloat16. Rows of tools that are not installed, run
out of memory or fail say so, and the others follow; the exit code is 1 if one of understudy's own failed. A table is
saved as soon as it is complete.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen3Config

from understudy import DPKD, GKD, JensenShannon, PromptKD

from . import loss, rollouts, step
from .measure import RESULTS, alternate, peak_mb, save, table, wait_for_gpu

Row = dict[str, Any]
LOSSES = ["understudy, compiled", "understudy", "understudy, Triton", "Liger, compiled", "TRL chunked"]
DECODERS = ["transformers generate", "understudy", "understudy, compiled"]
METHODS = {
    "GKD": lambda: GKD(divergence=JensenShannon(0.5), reduction="token"),
    "PromptKD": lambda: PromptKD(initialize="random"),
    "PromptKD, checkpointing": lambda: PromptKD(initialize="random", checkpointing=True),
    "DPKD": DPKD,
}


def qwen3(vocabulary: int, width: int, inner: int, layers: int, heads: int, tied: bool = True) -> Qwen3Config:
    """Qwen3's shapes: 8 key-value heads of 128, or as many as there are heads."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        head_dim=min(128, width // heads * 2),
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def gpt2(vocabulary: int, width: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@dataclass(frozen=True)
class Shapes:
    """The sizes of a whole run of the benchmarks."""

    rows: int  # N of the loss
    vocabularies: tuple[int, ...]
    widths: tuple[int, int]  # of student and teacher, of the loss
    small: tuple[PretrainedConfig, PretrainedConfig]  # 120M and 1.5B, as in the three papers
    large: tuple[PretrainedConfig, PretrainedConfig]  # 0.6B and 8B
    responses: int  # generated at once
    tokens: int  # of a response
    batch: int
    repeats: int


FULL = Shapes(
    rows=4096,
    vocabularies=(50_257, 151_936, 262_144),
    widths=(1024, 4096),
    small=(gpt2(50_257, 768, 12, 12), gpt2(50_257, 1600, 48, 25)),
    large=(qwen3(151_936, 1024, 3072, 28, 16), qwen3(151_936, 4096, 12_288, 36, 32, tied=False)),
    responses=64,
    tokens=256,
    batch=8,
    repeats=5,
)
TINY = Shapes(
    rows=24,
    vocabularies=(300,),
    widths=(8, 16),
    small=(gpt2(300, 16, 1, 2), gpt2(300, 32, 2, 2)),
    large=(qwen3(300, 16, 32, 1, 2), qwen3(300, 32, 64, 2, 2, tied=False)),
    responses=3,
    tokens=4,
    batch=2,
    repeats=1,
)


def model(config: PretrainedConfig, device: str) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def models(configs: tuple[PretrainedConfig, PretrainedConfig], device: str) -> tuple[Any, Any]:
    return model(configs[0], device), model(configs[1], device)


def attempt(measure: Callable[[], Row]) -> Row:
    """The measurement, or why there is none."""
    try:
        return measure()
    except ImportError:
        return {"status": "not installed"}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:
        return {"status": f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def loss_table(which: str, vocabulary: int, shapes: Shapes, device: str) -> dict[str, Row]:
    """Milliseconds forward and backward, as a ratio to the four matrix products too; memory beyond the inputs."""
    task = loss.Task(shapes.rows, vocabulary, *shapes.widths, dtype=torch.bfloat16, device=device)

    def measured(call: Callable[[], Any]) -> Row:
        grown = peak_mb(call)  # compiles and warms up
        [clock] = alternate({"": call}, shapes.repeats).values()
        return {"ms": 1000 * statistics.median(clock.wall), "memory_mb": grown}

    def contestant(name: str) -> Row:
        if name == "understudy, Triton" and device == "cpu":
            return {"status": "needs a GPU" if find_spec("triton") else "not installed"}
        if name == "understudy, Triton" and not find_spec("triton"):
            return {"status": "not installed"}
        implementation = loss.implementation(name, which)
        peak_mb(lambda: task.run(implementation))  # the gradients' own memory, and what is compiled
        return measured(lambda: task.run(implementation))

    rows = {"floor: matrix products": attempt(lambda: measured(partial(loss.floor, task)))}
    for name in LOSSES:
        rows[name] = attempt(partial(contestant, name))
    floor = rows["floor: matrix products"].get("ms")
    return {name: {"ratio": row["ms"] / floor, **row} if floor and "ms" in row else row for name, row in rows.items()}


def decode_table(shapes: Shapes, device: str) -> dict[str, Row]:
    """Tokens per second of the smaller of the large pair, and the memory of a call beyond the model."""
    config = shapes.large[0]
    student = model(config, device)
    calls = rollouts.implementations(config.vocab_size, None, shapes.tokens, student, shapes.responses)

    def measured(call: Callable[[], int]) -> Row:
        grown = peak_mb(call)
        rates = []
        for _ in range(shapes.repeats):
            wait_for_gpu()
            start = time.perf_counter()
            tokens = call()
            wait_for_gpu()
            rates.append(tokens / (time.perf_counter() - start))
        return {"tokens/s": statistics.median(rates), "memory_mb": grown}

    with torch.no_grad():
        return {name: attempt(partial(measured, calls[name])) for name in DECODERS}


def step_row(name: str, setting: step.Setting, repeats: int) -> Row:
    """Median seconds of a training step, and memory beyond both models."""
    result = step.run(name, setting, repeats)
    return {"seconds": statistics.median(result["wall"]), "memory_mb": result["peak_mb"]}


def setting(configs: tuple[Any, Any], shapes: Shapes, device: str, **fields: Any) -> step.Setting:
    vocabulary = configs[0].vocab_size
    pair = partial(models, configs, device)
    return step.Setting(vocabulary, shapes.tokens, batch=shapes.batch, models=pair, cpu=device == "cpu", **fields)


def step_table(shapes: Shapes, device: str) -> dict[str, Row]:
    """An on-policy step of the large pair: understudy, compiled and not, and TRL's two trainers."""
    large = setting(shapes.large, shapes, device)
    return {name: attempt(partial(step_row, name, large, shapes.repeats)) for name in step.NAMES}


def method_table(shapes: Shapes, device: str) -> dict[str, Row]:
    """A step of the small pair by the method of each of the three papers."""
    return {
        name: attempt(
            lambda method=method: step_row(
                "understudy", setting(shapes.small, shapes, device, method=method()), shapes.repeats
            )
        )
        for name, method in METHODS.items()
    }


def run(shapes: Shapes, device: str, folder: Path) -> dict[str, dict[str, Row]]:
    """Measure, print and save all tables; returns them by title."""
    tables: dict[str, Callable[[], dict[str, Row]]] = {
        f"loss: {which}, N = {shapes.rows:,}, V = {vocabulary:,}": partial(loss_table, which, vocabulary)
        for vocabulary in shapes.vocabularies
        for which in loss.DIVERGENCES
    }
    tables |= {
        f"decoding: {shapes.responses} responses of {shapes.tokens} tokens, 0.6B": decode_table,
        "step: 0.6B from 8B": step_table,
        "methods: 120M from 1.5B": method_table,
    }
    results: dict[str, dict[str, Row]] = {}
    for title, measure in tables.items():
        results[title] = measure(shapes=shapes, device=device)
        table(title, results[title])
        name = "gpu" if shapes is FULL else "gpu-tiny"
        save(name, {"tiny": shapes is TINY, "tables": results}, folder)
    return results


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run on tiny shapes, whose figures mean nothing")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are saved")
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("there is no CUDA device here: `--tiny` is a dry run on the CPU")
    if options.tiny:
        print("A dry run on tiny shapes, not compiled: its figures say nothing about speed.")
    with torch.compiler.set_stance("force_eager") if options.tiny else nullcontext():
        results = run(TINY if options.tiny else FULL, device, options.folder)
    rows = [(name, row.get("status", "")) for rows in results.values() for name, row in rows.items()]
    peers = ("Liger", "TRL", "transformers")
    return int(any(status.startswith("failed") and not name.startswith(peers) for name, status in rows))


if __name__ == "__main__":
    sys.exit(main())
