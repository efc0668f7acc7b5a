"""Distillation across tokenizers on the playground: SFT beside KD over every kind of events.

The student has the shape of the playground's warm start and a byte-level BPE that is trained on its problems or
instructions. In arithmetic its tokens are several of the teacher's, "24" for instance; in instructions the words of the
teacher's are several tokens of the student. It learns them by SFT from random weights, and from this warm start goes on
in every way for the same number of steps, with the same rows. Measured is greedy accuracy on test rows, the share of
tokens that begin where one of the teacher's does, and the share of these whose two next tokens are one event.

    python -m benchmarks.cross_tokenizer --task arithmetic --size 700
    python -m benchmarks.cross_tokenizer --task instructions --size 420
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from understudy.batch import Example
from understudy.data.retokenize import Retokenizer
from understudy.data.token_events import events_of_tokens
from understudy.data.tokenize import TextEncoder
from understudy.evaluation.evaluate_model import evaluate_model
from understudy.evaluation.settings import EvalSettings
from understudy.models.load import load_tokenizer
from understudy.playground.names import rows
from understudy.recipe import Data, load
from understudy.run.distill import distill

ROWS = {"arithmetic": 1000, "instructions": 2000}  # by task, as in the recipes
WAYS: dict[str, dict[str, Any] | None] = {"sft": None} | {
    f"{events}{' + spans' if spans else ''}": {"events": events, "spans": spans}
    for events, spans in (
        ("shared", False),
        ("first_piece", False),
        ("first_piece", True),
        ("first_byte", False),
        ("ranks", False),
    )
}


def bpe(task: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of up to `size` tokens, trained on the texts that the student learns."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [row["prompt"] + row["completion"] for row in rows(task, seed=1, limit=ROWS[task.split(":")[1]])]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def correspondence(task: str, tokenizer: Any) -> tuple[float, dict[str, float]]:
    """The share of tokens with a shared boundary, and by events the share of these whose two tokens are one event."""
    own = load_tokenizer(task)
    retokenizer = Retokenizer(tokenizer, own)
    texts = TextEncoder(tokenizer).encode_responses([row["completion"] for row in rows(task, "test", limit=500)])
    responses = [[*ids, tokenizer.eos_token_id] for ids in texts]
    parts = retokenizer.retokenize([Example([5], ids) for ids in responses])
    pairs = [
        (token, part.response[index])
        for ids, part in zip(responses, parts, strict=True)
        for token, index in zip(ids, part.indices, strict=True)
        if index is not None
    ]
    shares = {}
    for kind in ("shared", "first_piece", "first_byte"):
        events = events_of_tokens(retokenizer, kind, (len(tokenizer), len(own)))
        same = [events.source[a] == events.target[b] < events.count - 1 for a, b in pairs]
        shares[kind] = round(sum(same) / len(same), 3)
    return len(pairs) / sum(map(len, responses)), shares


def method(options: dict[str, Any] | None) -> dict[str, Any]:
    """SFT, or KD with half of the weight for labels; over ranks ULD's loss, CE + 1.5 Σ |p − q|, divided by 4."""
    if options is None:
        return {"sft": {}}
    if options["events"] == "ranks":
        return {"kd": {"divergence": "total_variation", "sft_weight": 0.25}}
    return {"kd": {"divergence": "forward_kl", "sft_weight": 0.5}}


def trained(folder: Path, task: str, student: dict[str, Any], seed: int, steps: int, options: Any = None) -> Path:
    """Train a student, and return its folder."""
    training = {"max_steps": steps, "seed": seed, "output_dir": str(folder), "per_device_train_batch_size": 32}
    training |= {"lr_scheduler_type": "linear", "warmup_steps": 20, "adam_beta2": 0.98, "learning_rate": 4e-3}
    training |= {"logging_steps": 50, "save_strategy": "no", "disable_tqdm": True}
    data = {"dataset": task, "limit": ROWS[task.split(":")[1]], "max_length": 256, "seed": 1}
    content = {"student": student, "method": method(options), "data": data, "evaluate": {"show": 0}}
    content |= {"training": training, "rollout": {"generate": {"max_new_tokens": 64}}}
    if options is not None:
        content["teacher"] = {"cross_tokenizer": {"model": task, "dtype": "float32", **options}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    distill(load(path), console=Console(quiet=True))
    return folder / "student"


def accuracy(task: str, model: str, count: int) -> float:
    """Greedy accuracy on test rows."""
    settings = EvalSettings(Data(dataset=task, split="test", limit=count), dtype="float32", max_new_tokens=64)
    return evaluate_model(model, settings).metrics["accuracy"]


def main(task: str, size: int, warm_steps: int, steps: int, seeds: int, count: int) -> None:
    tokenizer = bpe(task, size)
    share, same = correspondence(task, tokenizer)
    print(f"{len(tokenizer)} tokens; shared boundaries {share:.3f}; both tokens one event: {same}", flush=True)
    print(f"| teacher | {accuracy(task, task, count):.3f} |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        tokenizer.save_pretrained(home / "tokenizer")
        shape = load("playground/warm_start").student.fresh
        fresh = {**shape, "vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 0}
        student = {"tokenizer": str(home / "tokenizer"), "fresh": fresh}
        warm = str(trained(home / "warm", task, student, 0, warm_steps))
        print(f"| warm start | {accuracy(task, warm, count):.3f} |", flush=True)
        for way, options in WAYS.items():
            start = time.process_time()
            students = [
                trained(home / f"{way.replace(' ', '')}-{seed}", task, {"model": warm}, seed, steps, options)
                for seed in range(seeds)
            ]
            seconds = (time.process_time() - start) / seeds
            results = " | ".join(f"{accuracy(task, str(path), count):.3f}" for path in students)
            print(f"| {way} | {results} | {seconds:.0f} CPU s |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ROWS, default="arithmetic")
    parser.add_argument("--size", type=int, default=700)
    parser.add_argument("--warm-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=1000)
    arguments = vars(parser.parse_args())
    main(f"playground:{arguments.pop('task')}", **arguments)
