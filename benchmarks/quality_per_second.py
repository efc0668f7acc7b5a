"""How soon a student is as good as TRL's GKDTrainer makes it: the demo's GKD, where worked examples are few.

Both begin at the shipped warm start, with the recipe's teacher, 1,000 prompts, forward KL, batch, optimizer and
schedule; every response is the student's own, at most 48 tokens. TRL trains for the recipe's number of steps; this
package for that many, half and a quarter of them, each with a schedule to its end. Measured is greedy accuracy on 1,000
test problems, outside the time.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from understudy import GenerateRollout, Sampling
from understudy.data.load import load_data
from understudy.evaluation.evaluate import evaluate
from understudy.generation.stop_tokens import stop_ids
from understudy.models.load import load_model, load_tokenizer
from understudy.recipe import Data, load
from understudy.run.distill import distill

from .measure import in_child, save, table

PLAYGROUND = "playground:arithmetic"
RECIPE = load("playground/gkd")
STUDENT, TRAINING = RECIPE.student.model, RECIPE.training
STEPS, LONGEST = TRAINING["max_steps"], 48


class TrainingTime(TrainerCallback):
    """From the first step's beginning to the end of training."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def accuracy(model: Any) -> float:
    tokenizer = load_tokenizer(PLAYGROUND)
    examples = load_data(Data(dataset=PLAYGROUND, split="test", limit=1000, max_length=160), tokenizer, None, 64)
    sampling = Sampling(max_new_tokens=64, temperature=0, stop_ids=tuple(stop_ids(tokenizer, model)))
    return evaluate(model.eval(), tokenizer, examples, GenerateRollout(256), sampling).metrics["accuracy"]


def understudy(steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"training.output_dir={folder}/run", f"training.max_steps={steps}", "method.gkd.reduction=token"]
        changes += ["training.eval_strategy=no", "training.eval_on_start=false", "evaluate.show=0"]
        summary = distill(load("playground/gkd", changes), restart=True)
        model = load_model(f"{folder}/run/student", dtype="float32")
    return {"seconds": summary["seconds"], "accuracy": accuracy(model)}


def trl(steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer: Any = load_tokenizer(PLAYGROUND)
    model = load_model(str(STUDENT), dtype="float32")
    teacher = load_model(PLAYGROUND, dtype="float32")
    model.generation_config.eos_token_id = stop_ids(tokenizer, model)
    rows = load_data(RECIPE.data, tokenizer, None, LONGEST)

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
            per_device_train_batch_size=TRAINING["per_device_train_batch_size"],
            learning_rate=float(TRAINING["learning_rate"]),
            lr_scheduler_type=TRAINING["lr_scheduler_type"],
            warmup_steps=TRAINING["warmup_steps"],
            adam_beta2=TRAINING["adam_beta2"],
            lmbda=1.0,
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
    parser.add_argument("--run", nargs=2, metavar=("NAME", "STEPS"))
    args = parser.parse_args()
    if args.run:
        name, steps = args.run
        print(json.dumps({"understudy": understudy, "trl": trl}[name](int(steps))))
        return
    results: dict[str, Any] = {}
    for name, steps in (("trl", STEPS), *(("understudy", STEPS // part) for part in (1, 2, 4))):
        results[f"{name}, {steps} steps"] = in_child("quality_per_second", "--run", name, str(steps))
    table("playground, GKD on 1,000 prompts: seconds of training and greedy accuracy on 1,000 problems", results)
    save("quality_per_second", {"runs": results})


if __name__ == "__main__":
    main()
