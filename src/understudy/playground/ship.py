"""Put a trained model into the package: `python -m understudy.playground.ship FOLDER playground:NAME`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .names import resolve
from .vocabulary import tokenizer

LIMITS = {  # bytes
    "playground:arithmetic": 8 * 2**20,
    "playground:arithmetic-student": 2**20,
    "playground:both-student": 2**20,
    "playground:contexts-student": 2**20,
    "playground:instructions": 8 * 2**20,
    "playground:instructions-student": 2**20,
}


def ship(model: str, name: str) -> None:
    """Save a model in bfloat16, with the playground's tokenizer, in the folder of a name of the playground."""
    target = Path(resolve(name))
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(target)
    tokenizer(name.removesuffix("-student")).save_pretrained(target)
    size = (target / "model.safetensors").stat().st_size
    assert size <= LIMITS[name], f"{size} bytes are more than the package should carry"
    sys.stdout.write(f"{target}: {size / 2**20:.1f} MB\n")


if __name__ == "__main__":
    ship(*sys.argv[1:])
