"""Sampling responses: this package's loop (as it is, and compiled), transformers' `generate` and continuous batching.

What is timed: 64 prompts of 32 tokens, temperature 1, a Llama student of 2 layers of 128, float32. Reported are useful
tokens a second, those up to and with a response's end. Everybody has the same model, prompts and stop tokens; lengths
are sampled by each implementation itself, so rates are compared and not times. The first call of each, in which it
compiles, is not counted; `first_call` is its time.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig

from understudy import GenerateRollout, Sampling, Step

from .measure import Stopwatch, save, table
from .models import llama, prompts, stop_tokens, words

CASES: dict[str, dict[str, Any]] = {
    "V = 4,096, lengths varied (mean 48, at most 192)": {"vocabulary": 4096, "mean": 48, "most": 192},
    "V = 50,257, 128 tokens each": {"vocabulary": 50_257, "mean": None, "most": 128},
}
ROWS, PROMPT = 64, 32


def implementations(
    vocabulary: int, mean: int | None, most: int, model: Any = None, rows: int = ROWS
) -> dict[str, Callable[[], int]]:
    """Implementations, each of which generates `rows` responses and returns their number of tokens."""
    model, examples = model or llama(vocabulary, 128, 2), prompts(rows, PROMPT, vocabulary)
    stop = stop_tokens(mean, vocabulary)
    ids = torch.tensor([example.prompt for example in examples], device=model.device)
    steps, tokenizer = count(), words(vocabulary)

    def understudy(compiled: bool) -> int:
        rollout = GenerateRollout(compiled=compiled).bind(model, tokenizer)
        sampling = Sampling(most, stop_ids=tuple(stop or [vocabulary]))  # no token has that number
        return sum(len(example.response) for example in rollout.generate(examples, sampling, Step(next(steps))))

    config = GenerationConfig(
        max_new_tokens=most, do_sample=True, top_k=0, top_p=1.0, eos_token_id=stop or None, pad_token_id=0
    )

    def useful(responses: list[list[int]]) -> int:
        ends = ((i + 1 for i, token in enumerate(row) if token in stop) for row in responses)
        return sum(next(end, len(row)) for end, row in zip(ends, responses, strict=True))

    def generate() -> int:
        sequences = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return useful(sequences[:, PROMPT:].tolist())

    def continuous() -> int:
        batching = _batching_config(most, rows)
        outputs = model.generate_batch(ids.tolist(), generation_config=config, continuous_batching_config=batching)
        return useful([output.generated_tokens for output in outputs.values()])

    return {
        "transformers generate": generate,
        "understudy": partial(understudy, False),
        "understudy, compiled": partial(understudy, True),
        "transformers continuous": continuous,
    }


def _batching_config(most: int, rows: int) -> Any:
    """Room for all rows at once; half of the machine's memory, its default, would be taken and zeroed first."""
    from transformers import ContinuousBatchingConfig

    page = 32
    return ContinuousBatchingConfig(
        page_size=page, num_blocks=2 * rows * ((PROMPT + most) // page + 1), max_batch_tokens=rows * PROMPT
    )


def race(vocabulary: int, mean: int | None, most: int, rounds: int = 3) -> dict[str, Any]:
    calls = implementations(vocabulary, mean, most)
    clocks = {name: Stopwatch() for name in calls}
    tokens: dict[str, list[int]] = {name: [] for name in calls}
    first: dict[str, float] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
    for turn in range(rounds):
        for name, call in calls.items():
            if turn == 0 or name != "transformers continuous":  # slow, and steady
                tokens[name].append(clocks[name].time(call))
    rates = {name: [n / s for n, s in zip(tokens[name], clocks[name].wall, strict=True)] for name in calls}
    cpu_rates = {name: [n / s for n, s in zip(tokens[name], clocks[name].cpu, strict=True)] for name in calls}
    base = "transformers generate"
    return {
        name: {
            "ratio": statistics.median(each) / statistics.median(rates[base]),
            "cpu_ratio": statistics.median(cpu_rates[name]) / statistics.median(cpu_rates[base]),
            "tokens/s": statistics.median(each),
            "min": min(each),
            "max": max(each),
            "tokens/cpu_s": statistics.median(cpu_rates[name]),
            "first_call": first[name],
            "runs": len(each),
        }
        for name, each in rates.items()
    }


def main() -> None:
    results = {}
    for name, case in CASES.items():
        results[name] = race(**case)
        table(f"{name}: useful tokens a second, ratio to transformers generate", results[name])
    save("rollouts", {"rates": results})


if __name__ == "__main__":
    main()
