"""Tiny models, tokenizers, datasets and recipes in folders, for tests of the commands."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CHARACTERS = "0123456789+-*/=#\n .,?abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def characters(characters: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every character."""
    tokens = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


VOCABULARY = len(characters())


def llama(folder: Path, seed: int = 0, tokenizer: Any = None, **fields: Any) -> Path:
    """A random Llama with its tokenizer in `folder`."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **fields}))
    return _save(model, folder, tokenizer)


def gpt2(folder: Path, seed: int = 0) -> Path:
    """A random GPT-2 with its tokenizer in `folder`."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _save(GPT2LMHeadModel(config), folder, None)


def _save(model: Any, folder: Path, tokenizer: Any) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.mul_(10)  # far from uniform
    model.save_pretrained(folder)
    (tokenizer or characters()).save_pretrained(folder)
    return folder


def load_example(name: str) -> Any:
    """The module of a file in examples/."""
    spec: Any = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sums(path: Path, count: int = 12) -> Path:
    """A dataset of sums, "1+2=" and "3"."""
    rows = [{"prompt": f"{i}+{i % 5}=", "completion": f"#### {i + i % 5}"} for i in range(count)]
    return jsonl(path, rows)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe, one top-level key per line."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def described(home: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a two-step run of GKD with the things in `home`, which lack `changes` (None removes)."""
    content: dict[str, Any] = {
        "student": {"fresh": {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}},
        "teacher": {"local": {"model": str(home / "teacher")}},
        "method": {"gkd": {"on_policy": 0.5}},
        "rollout": {"generate": {"max_new_tokens": 8}},
        "data": {"dataset": str(home / "sums.jsonl"), "max_length": 32},
        "training": {
            "output_dir": str(home / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 1,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


def link_all(source: Path, target: Path) -> None:
    """Link everything in `source` into `target`, for tests that share what takes long to make."""
    for thing in source.iterdir():
        (target / thing.name).symlink_to(thing)
