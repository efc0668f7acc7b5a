"""Copy a trained teacher into the package: `python -m understudy.playground.ship runs/teacher/student`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .names import resolve
from .vocabulary import tokenizer

LIMIT = 8 * 2**20  # bytes


def ship(student: str) -> None:
    """Save the model in bfloat16, with the playground's tokenizer, in the folder of `playground:arithmetic`."""
    target = Path(resolve("playground:arithmetic"))
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(target)
    tokenizer().save_pretrained(target)
    size = (target / "model.safetensors").stat().st_size
    assert size <= LIMIT, f"{size} bytes are more than the package should carry"
    sys.stdout.write(f"{target}: {size / 2**20:.1f} MB\n")


if __name__ == "__main__":
    ship(sys.argv[1])
