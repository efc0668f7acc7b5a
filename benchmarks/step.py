"""A whole on-policy step: this package's trainer, TRL's GKDTrainer and TRL's DistillationTrainer, in child processes.

What is timed: batch 8, prompts of 32 tokens, responses of exactly as many tokens as are asked for, JSD(0.5), AdamW,
float32 without gradient checkpointing (TRL's faster setting); a Llama teacher of 6 layers of 256, a student of 2 layers
of 128. The first step is not counted, it warms up; where something is compiled, the second is not, either. The
implementations' processes alternate.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from understudy import GKD, Example, GenerateRollout, JensenShannon, LocalTeacher, Method, Sampling, StudentTrainer
from understudy.training import trainer as training

from .measure import Stopwatch, in_child, peak_mb, save, table, wait_for_gpu
from .models import llama, prompts, words

CASES = {"V = 50,257, 8 × 256 tokens": (50_257, 256, 2), "V = 4,096, 8 × 64 tokens": (4096, 64, 20)}
NAMES = ["understudy, compiled", "understudy", "TRL DistillationTrainer", "TRL GKDTrainer"]
BATCH, PROMPT = 8, 32


class Clock(TrainerCallback):
    """When each step's gradients were ready: wall clock, and seconds computed."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        wait_for_gpu()
        self.times.append((time.perf_counter(), time.process_time()))


@dataclass(frozen=True)
class Setting:
    """What a step is measured with."""

    vocabulary: int
    tokens: int
    method: Method = field(default_factory=lambda: GKD(divergence=JensenShannon(0.5), reduction="token"))
    batch: int = BATCH
    models: Callable[[], tuple[Any, Any]] | None = None  # student and teacher; default: the Llamas above
    cpu: bool = True

    def pair(self) -> tuple[Any, Any]:
        if self.models is not None:
            return self.models()
        return llama(self.vocabulary, 128, 2), llama(self.vocabulary, 256, 6, seed=1)


def arguments(folder: str, steps: int, setting: Setting) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "use_cpu": setting.cpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def trainer(name: str, setting: Setting, steps: int, folder: str) -> Any:
    vocabulary, tokens = setting.vocabulary, setting.tokens
    (student, teacher), tokenizer = setting.pair(), words(vocabulary)
    examples = prompts(setting.batch * steps, PROMPT, vocabulary)
    student.generation_config.eos_token_id = None
    clock = Clock()
    if name.startswith("understudy"):
        args = TrainingArguments(**arguments(folder, steps, setting), torch_compile=False)
        sampling = Sampling(max_new_tokens=tokens, stop_ids=(vocabulary,))
        data: Any = [Example(e.prompt, [4], row=e.row) for e in examples]
        options = {"processing_class": tokenizer, "train_dataset": data, "args": args, "callbacks": [clock]}
        student_trainer = StudentTrainer(
            student, LocalTeacher(teacher), setting.method, GenerateRollout(), sampling, **options
        )
        training.compiles = lambda *_: "compiled" in name  # not decided by the length of these short runs
        return student_trainer, clock
    from datasets import Dataset

    texts = [tokenizer.decode(example.prompt) for example in examples]
    tokenizer.eos_token_id = 2
    if name == "TRL GKDTrainer":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        messages = [[{"role": "user", "content": t}, {"role": "assistant", "content": "w4"}] for t in texts]
        config = GKDConfig(
            **arguments(folder, steps, setting),
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=tokens,
            max_length=1024,
        )
        data = Dataset.from_dict({"messages": messages})
        student_trainer = GKDTrainer(
            student, teacher, config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
        student_trainer.generation_config.eos_token_id = None
        return student_trainer, clock
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        **arguments(folder, steps, setting),
        beta=0.5,
        temperature=1.0,
        top_p=1.0,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
    )
    data = Dataset.from_dict({"prompt": texts})
    return DistillationTrainer(
        student, teacher, config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    ), clock


def run(name: str, setting: Setting, steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps (from one optimizer step to the next) after those that warm up, and the memory."""
    warm = 2 if "compiled" in name else 1
    with tempfile.TemporaryDirectory() as folder:
        student_trainer, clock = trainer(name, setting, steps + warm, folder)
        grown = peak_mb(student_trainer.train)
    wall, cpu = zip(*clock.times[warm - 1 :], strict=True)
    return {"wall": _gaps(wall), "cpu": _gaps(cpu), "peak_mb": grown}


def _gaps(times: tuple[float, ...]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=4, metavar=("NAME", "V", "TOKENS", "STEPS"))
    args = parser.parse_args()
    if args.run:
        name, vocabulary, tokens, steps = args.run
        print(json.dumps(run(name, Setting(int(vocabulary), int(tokens)), int(steps))))
        return
    results: dict[str, Any] = {}
    for title, (vocabulary, tokens, steps) in CASES.items():
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for _ in range(2):
            for name in NAMES:
                runs[name].append(in_child("step", "--run", name, str(vocabulary), str(tokens), str(steps // 2)))
        clocks = {name: Stopwatch() for name in NAMES}
        for name, children in runs.items():
            clocks[name].wall = [s for child in children for s in child["wall"]]
            clocks[name].cpu = [s for child in children for s in child["cpu"]]
        results[title] = {
            name: clock.summary(clocks[NAMES[0]]) | {"peak_mb": max(child["peak_mb"] for child in runs[name])}
            for name, clock in clocks.items()
        }
        table(f"{title}: seconds a step, ratio to the first; the process's growth in MB", results[title])
        save("step", {"steps": results})


if __name__ == "__main__":
    main()
