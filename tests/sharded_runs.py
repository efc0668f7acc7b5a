"""A process of a sharded run: `python -m torch.distributed.run … sharded_runs.py KIND ACTION FOLDER`.

The same runs without sharding, in one process, are what the results are compared with.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fakes import ragged_examples, tiny
from loop import logged, short_sampling, student, trainer
from transformers import TrainerCallback

from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.promptkd import PromptKD
from understudy.methods.sft import SFT
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

ZERO: dict[str, Any] = {"stage3_param_persistence_threshold": 0}  # or so small a model would not be sharded
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "fsdp": {"fsdp": True},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, **ZERO}}},
}
CASES: dict[str, Callable[[], Any]] = {
    "sft": lambda: SFT(),
    "kd, gradient checkpointing": lambda: KD(reduction="sequence"),
    "gkd, tied embeddings": lambda: GKD(),
    "gkd, adapters": lambda: GKD(),
    "promptkd": lambda: PromptKD(prompt_tokens=3, prompt_lr=1e-2, prompt_warmup=2),
    "dpkd, sharded teacher": lambda: DPKD(),
}


class Kill(TrainerCallback):
    """SIGKILL in the third step, after its backward passes."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def run_of(folder: Path, kind: str, case: str, processes: int, callbacks=(), **changed) -> StudentTrainer:
    """Two epochs of two steps of eight examples, over all processes. Adam's large epsilon keeps rounding small."""
    shard = "sharded teacher" in case and kind != "one"
    return trainer(
        folder,
        CASES[case](),
        student("llama+lora" if "adapters" in case else "llama", tied="tied" in case),
        LocalTeacher(tiny("llama", width=24, seed=2), shard=shard),
        None,
        short_sampling(stop_ids=[2, *range(5, 15)]),
        ragged_examples(16),
        options={"eval_dataset": ragged_examples(5, seed=4), "callbacks": callbacks},
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        adam_epsilon=1e-3,
        gradient_checkpointing="gradient checkpointing" in case,
        **{"eval_strategy": "epoch", **KINDS[kind], **changed},
    )


def whole_weights(run: StudentTrainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered in the first process."""
    state = run.accelerator.get_state_dict(run.model_wrapped)
    return {name: weight.cpu() for name, weight in (state or {}).items()}


def train(folder: Path, kind: str, case: str, processes: int, resume: bool = False, **changed) -> dict[str, Any]:
    run = run_of(folder, kind, case, processes, **changed)
    run.train(resume_from_checkpoint=resume)
    numbers = {name: logged(run, name) for name in ("loss", "grad_norm", "eval_loss")}
    own = sum(_kept(parameter) for parameter in run.model.parameters())
    return {"weights": whole_weights(run), "numbers": numbers, "kept": own}


def _kept(parameter: Any) -> int:
    """How many numbers of a parameter this process keeps."""
    shard = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
    return shard.numel()


def main(kind: str, action: str, folder: Path) -> None:
    torch.set_num_threads(1)
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])

    def store(name: str, result: Any) -> None:
        if rank == 0:
            torch.save(result, folder / f"{kind}, {name}.pt")

    every_step = {"save_strategy": "steps", "save_steps": 1}
    if action == "train":
        for case in CASES:
            store(case, train(folder / "run", kind, case, processes))
        run_of(folder / kind, kind, "promptkd", processes, callbacks=[Kill()], **every_step).train()
    elif action == "gkd":
        store("gkd", train(folder / "run", kind, "gkd, tied embeddings", processes))
    elif action == "resume":
        store("resumed", train(folder / kind, kind, "promptkd", processes, resume=True, **every_step))
    elif action == "resume-elsewhere":
        store("resumed elsewhere", train(folder / kind, kind, "promptkd", processes, resume=True, save_strategy="no"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
