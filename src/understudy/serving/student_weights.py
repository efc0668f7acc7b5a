"""A student's weights in a folder that vLLM reads: the whole model with an untied head, or LoRA adapters alone.

vLLM (0.32, on a CPU) keeps a copy of a tied head that it does not renew when weights are reloaded. So the head is
written beside the embeddings, and the configuration says that the two are not tied.
"""

import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.adapters import without_adapters

_MEMORY = Path("/dev/shm")
_BASE_LAYER = ".base_layer."  # in the names of weights that PEFT has wrapped
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be started with


class WeightFolder:
    """A temporary folder for one student's weights, in memory where the system has such a place.

    Args:
        parent: where to create it, for a server that shares only that folder with this machine.
    """

    def __init__(self, parent: str | None = None) -> None:
        place = parent or (str(_MEMORY) if _MEMORY.is_dir() else None)
        self.path = Path(tempfile.mkdtemp(prefix="understudy-weights-", dir=place))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)  # also when Python ends

    def write_model(self, model: Any) -> Path:
        """Write the model, without its adapters if it has such, over what was written before."""
        check_whole(model)
        bare, folder = without_adapters(model), self.path / "model"
        weights = {
            name.replace(_BASE_LAYER, "."): weight for name, weight in bare.state_dict().items() if ".lora_" not in name
        }
        config = json.loads(bare.config.to_json_string(use_diff=False))
        bare.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")  # else an index names the files
        head = bare.get_output_embeddings()
        name = next((name for name, module in bare.named_modules() if module is head), None)
        if name is not None and _is_tied(bare):
            tensors = {key: value.detach().contiguous().clone() for key, value in head.named_parameters()}
            save_file({f"{name}.{key}": value for key, value in tensors.items()}, folder / "head.safetensors")
            config["tie_word_embeddings"] = False
            (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        return folder

    def write_adapters(self, model: Any) -> Path:
        """Write the adapters alone, over those written before."""
        check_whole(model)
        folder = self.path / "adapters"
        model.save_pretrained(folder)
        return folder


def has_adapters(model: Any) -> bool:
    """Does the student have LoRA adapters?

    Raises:
        ValueError: for adapters of another kind, which vLLM cannot load.
    """
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    if kinds - {"LORA"}:
        raise ValueError(
            f"vllm serves LoRA adapters, and none of the kind {min(kinds - {'LORA'})}: use rollout generate"
        )
    return bool(kinds)


def adapter_rank(model: Any) -> int:
    """The smallest `--max-lora-rank` for the student's adapters."""
    rank = max(max([c.r, *c.rank_pattern.values()]) for c in model.peft_config.values())
    return next((size for size in _RANKS if size >= rank), rank)


def check_whole(model: torch.nn.Module) -> None:
    """Refuse a student whose weights are divided among processes.

    Raises:
        ValueError: with the remedy.
    """
    if any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters()):
        raise ValueError(
            "rollout vllm needs a student that every process holds as a whole, and not one sharded by FSDP or ZeRO-3: "
            "train with DDP, or use rollout generate"
        )


def _is_tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight
