"""A process of a sharded run: `python -m torch.distributed.run … sharded_runs.py KIND ACTION FOLDER [OPTIONS]`.

The same runs without sharding, in one process, are what the results are compared with. OPTIONS are TrainingArguments as
JSON, such as the device.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fakes import ragged_examples, tiny
from folders import described, llama, sums
from loop import logged, short_sampling, student, trainer
from packed_attention import ATTENTION

from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.promptkd import PromptKD
from understudy.methods.sft import SFT
from understudy.recipe import parse
from understudy.run.distill import distill
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

ZERO: dict[str, Any] = {"stage3_param_persistence_threshold": 0}  # or so small a model would not be sharded
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "fsdp": {"fsdp": True},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, **ZERO}}},
}
CPU = {"device": "cpu"}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, **ZERO}}},
}
CASES: dict[str, Callable[[], Any]] = {
    "sft": lambda: SFT(),
    "sft, offloaded": lambda: SFT(),
    "kd, packed, gradient checkpointing": lambda: KD(reduction="sequence"),
    "gkd, tied embeddings": lambda: GKD(),
    "gkd, adapters": lambda: GKD(),
    "promptkd": lambda: PromptKD(prompt_tokens=3, prompt_lr=1e-2, prompt_warmup=2),
    "dpkd, sharded teacher": lambda: DPKD(),
}


class KilledPromptKD(PromptKD):
    """PromptKD whose first process gets SIGKILL in the step of the environment variable KILL_IN, before its update."""

    def before_step(self, batches, teacher, student, step):
        super().before_step(batches, teacher, student, step)
        if (os.environ.get("KILL_IN"), os.environ["RANK"]) == (str(step.number), "0"):
            os.kill(os.getpid(), signal.SIGKILL)


def cases_of(kind: str) -> list[str]:
    return [case for case in CASES if "offloaded" not in case or kind in ("one", *OFFLOADED)]


def prepare(home: Path) -> None:
    """What the recipes below name."""
    llama(home / "teacher", num_hidden_layers=1)
    llama(home / "student", seed=1, num_hidden_layers=1)
    sums(home / "sums.jsonl")


def recipe_of(home: Path, kind: str, run: str, **changed: Any) -> dict[str, Any]:
    """A recipe of PromptKD for the command line, four steps of eight examples over two processes."""
    training = described(home)["training"] | {
        "output_dir": str(home / run),
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        **KINDS[kind],
    }
    method = {"sharded_runs:KilledPromptKD": {"prompt_tokens": 3, "prompt_lr": 1e-2, "prompt_warmup": 2}}
    student = {"model": str(home / "student"), "dtype": "float32"}
    return described(home, **{"student": student, "method": method, "training": training, **changed})


def merging(home: Path, kind: str, processes: int) -> dict[str, Any]:
    """A recipe of GKD with adapters that are merged at the end."""
    recipe = recipe_of(home, kind, f"{kind}, merged", method="gkd")
    recipe["student"] |= {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}, "merge": True}
    recipe["training"] |= {"per_device_train_batch_size": 4 // processes, "save_strategy": "no"}
    return recipe


def run_of(folder: Path, kind: str, case: str, processes: int, **changed) -> StudentTrainer:
    """Two epochs of two steps of eight examples, over all processes. Adam's large epsilon keeps rounding small."""
    shard = "sharded teacher" in case and kind != "one"
    model = student("llama+lora" if "adapters" in case else "llama", tied="tied" in case)
    if "packed" in case and kind != "one":
        model.config._attn_implementation = ATTENTION
    offloaded = OFFLOADED.get(kind, {}) if "offloaded" in case else {}
    return trainer(
        folder,
        CASES[case](),
        model,
        LocalTeacher(tiny("llama", width=24, seed=2), shard=shard),
        None,
        short_sampling(stop_ids=[2, *range(5, 15)]),
        ragged_examples(16),
        options={"eval_dataset": ragged_examples(5, seed=4)},
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        adam_epsilon=1e-3,
        gradient_checkpointing="gradient checkpointing" in case,
        **{"eval_strategy": "epoch", **KINDS[kind], **offloaded, **changed},
    )


def whole_weights(run: StudentTrainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered in the first process."""
    state = run.accelerator.get_state_dict(run.model_wrapped)
    return {name: weight.cpu() for name, weight in (state or {}).items()}


def train(folder: Path, kind: str, case: str, processes: int, **changed) -> dict[str, Any]:
    run = run_of(folder, kind, case, processes, **changed)
    run.train()
    numbers = {name: logged(run, name) for name in ("loss", "grad_norm", "eval_loss")}
    own = sum(_kept(parameter) for parameter in run.model.parameters())
    return {"weights": whole_weights(run), "numbers": numbers, "kept": own}


def _kept(parameter: Any) -> int:
    """How many numbers of a parameter this process keeps."""
    shard = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
    return shard.numel()


def main(kind: str, action: str, folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for case in cases_of(kind) if action != "gkd" else ["gkd, tied embeddings"]:
        result = train(folder / "run", kind, case, processes, **options)
        if rank == 0:
            torch.save(result, folder / f"{kind}, {case}.pt")
    if action == "train, merge and be killed":
        distill(parse(merging(folder, kind, processes)))
        distill(parse(recipe_of(folder, kind, "whole")))
        os.environ["KILL_IN"] = "2"
        distill(parse(recipe_of(folder, kind, "killed")))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
