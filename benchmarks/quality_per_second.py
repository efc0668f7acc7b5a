"""How soon a student is as good as TRL's GKDTrainer makes it: GKD on the playground.

Both begin at the recipes' warm start, with the same teacher, prompts, forward KL, batch, optimizer and schedule; half
of the batches are the student's own responses, at most 48 tokens, and half the dataset's, which is TRL's default.
TRL trains for a fixed number of steps; this package for that many, half and a quarter of them, each with a schedule to
its end. Measured is greedy accuracy on 500 test problems, outside the time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from understudy import GenerateRollout, Sampling
from understudy.data.load import load_data
from understudy.evaluation.evaluate import evaluate
from understudy.generation.stop_tokens import stop_ids
from understudy.models.load import load_model, load_tokenizer
from understudy.recipe import Data, load
from understudy.run.distill import distill

from .measure import in_child, save, table

PLAYGROUND = "playground:arithmetic"
STEPS, BATCH, RATE, LONGEST = 200, 32, 2e-3, 48


class TrainingTime(TrainerCallback):
    """From the first step's beginning to the end of training."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def accuracy(model: Any) -> float:
    tokenizer = load_tokenizer(PLAYGROUND)
    examples = load_data(Data(dataset=PLAYGROUND, split="test", limit=500, max_length=160), tokenizer, None, 64)
    sampling = Sampling(max_new_tokens=64, temperature=0, stop_ids=tuple(stop_ids(tokenizer, model)))
    return evaluate(model.eval(), tokenizer, examples, GenerateRollout(256), sampling).metrics["accuracy"]


def warm_up(folder: str) -> dict[str, Any]:
    recipe = load("playground/warm_start", [f"training.output_dir={folder}", "evaluate.show=0"])
    summary = distill(recipe, restart=True)
    return {"seconds": summary["seconds"], "accuracy": accuracy(load_model(f"{folder}/student", dtype="float32"))}


def understudy(student: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"student.model={student}", f"training.output_dir={folder}/run", f"training.max_steps={steps}"]
        changes += ["method.gkd.on_policy=0.5", "method.gkd.reduction=token", "evaluate.show=0"]
        changes += ["training.logging_steps=1000", f"training.learning_rate={RATE}"]
        recipe = load("playground/gkd", changes)
        summary = distill(recipe, restart=True)
        model = load_model(f"{folder}/run/student", dtype="float32")
    return {"seconds": summary["seconds"], "accuracy": accuracy(model)}


def trl(student: str, steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = load_tokenizer(PLAYGROUND)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    teacher = load_model(PLAYGROUND, dtype="float32")
    model.generation_config.eos_token_id = stop_ids(tokenizer, model)
    rows = load_data(Data(dataset=PLAYGROUND, limit=20_000, max_length=160, seed=2), tokenizer, None, LONGEST)

    def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, sequences))
        return torch.tensor([[value] * (width - len(ids)) + ids for ids in sequences])

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt_ids"] for row in batch]
        sequences = [row["prompt_ids"] + row["response_ids"] for row in batch]
        labels = [[-100] * len(row["prompt_ids"]) + row["response_ids"] for row in batch]
        return {
            "prompts": padded(prompts, tokenizer.pad_token_id),
            "prompt_attention_mask": padded([[1] * len(ids) for ids in prompts], 0),
            "input_ids": padded(sequences, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in sequences], 0),
            "labels": padded(labels, -100),
        }

    clock = TrainingTime()
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=10,
            adam_beta2=0.98,
            lmbda=0.5,
            beta=0.0,
            temperature=1.0,
            max_new_tokens=LONGEST,
            max_length=160,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        data = Dataset.from_dict(
            {"prompt_ids": [e.prompt for e in rows.examples], "response_ids": [e.response for e in rows.examples]}
        )
        trainer = GKDTrainer(
            model,
            teacher,
            config,
            data_collator=collate,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds, "accuracy": accuracy(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=3, metavar=("NAME", "STUDENT", "STEPS"))
    args = parser.parse_args()
    if args.run:
        name, student, steps = args.run
        result = (
            warm_up(student) if name == "warm" else {"understudy": understudy, "trl": trl}[name](student, int(steps))
        )
        print(json.dumps(result))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        warm = str(Path(folder) / "warm")
        results["warm start"] = in_child("quality_per_second", "--run", "warm", warm, "0")
        student = f"{warm}/student"
        for name, steps in (
            ("trl", STEPS),
            ("understudy", STEPS),
            ("understudy", STEPS // 2),
            ("understudy", STEPS // 4),
        ):
            results[f"{name}, {steps} steps"] = in_child("quality_per_second", "--run", name, student, str(steps))
    table("playground, GKD: seconds of training and greedy accuracy on 500 problems", results)
    save("quality_per_second", {"runs": results})


if __name__ == "__main__":
    main()
