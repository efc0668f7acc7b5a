"""A process of runs with rollout vllm: `python -m torch.distributed.run … vllm_runs.py KIND FOLDER [URL]`.

The fake server is at the URL, or is started by the first process. The same runs in one process are what the results are
compared with.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from fakes import ragged_examples
from loop import logged, short_sampling, student, trainer
from sharded_runs import KINDS, whole_weights
from transformers import TrainerCallback

from understudy.methods.gkd import GKD
from understudy.rollouts.vllm import VLLMRollout
from understudy.sampling import Schedule
from understudy.training.trainer import StudentTrainer

CASES = {"ddp": ["ahead, killed"], "fsdp": ["tied", "adapters"], "zero3": ["tied", "adapters"]}


def started(log: Path) -> list[dict[str, Any]]:
    """What the fake servers have written to their log: a process and its arguments for each."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"pid"')]


class KillServer(TrainerCallback):
    """SIGKILL to the server, by the number in its log, after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            os.kill(started(Path(args.output_dir) / "vllm.log")[-1]["pid"], signal.SIGKILL)


def run_of(
    folder: Path, kind: str, case: str, processes: int, url: str = "http://vllm:8000", transport: Any = None
) -> StudentTrainer:
    """Four steps of four examples, over all processes. Adam's large epsilon keeps rounding small.

    Without a `url` a server is started, by fake_engine's `interpreter`, which is in the folder above.
    """
    place = {"url": url} if url else {"start": True, "python": str(folder.parent / "python")}
    return trainer(
        folder,
        GKD(on_policy=1.0),
        student("llama+lora" if case == "adapters" else "llama", tied="tied" in case),
        None,
        VLLMRollout(**place, wait=60, _transport=transport),
        short_sampling(),
        ragged_examples(16),
        options={
            "schedule": Schedule(ahead=int("ahead" in case)),
            "callbacks": [] if url else [KillServer()],
        },
        per_device_train_batch_size=4 // processes,
        adam_epsilon=1e-3,
        **KINDS[kind],
    )


def main(kind: str, folder: Path, url: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case in CASES[kind]:
        run = run_of(folder / case, "one" if kind == "ddp" else kind, case, 2, url)
        run.train()
        results[case] = {"weights": whole_weights(run), "versions": logged(run, "weight_version")}
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
