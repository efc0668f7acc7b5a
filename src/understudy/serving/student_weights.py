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
from safetensors import safe_open
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

    def write_model(self, model: Any, vocabulary: int | None = None) -> Path:
        """Write the model, without its adapters if it has such, over what was written before.

        Args:
            vocabulary: tokens of the tokenizer, to which a padded vocabulary is cut; None: all are written.
        """
        check_whole(model)
        bare, folder = without_adapters(model), self.path / "model"
        weights = {
            name.replace(_BASE_LAYER, "."): weight for name, weight in bare.state_dict().items() if ".lora_" not in name
        }
        embeddings, head = (_name(bare, layer()) for layer in (bare.get_input_embeddings, bare.get_output_embeddings))
        for name in [name for name in weights if name.rpartition(".")[0] in (embeddings, head)]:
            weights[name] = weights[name][:vocabulary]
        shared = weights[f"{embeddings}.weight"].detach().contiguous()
        bare.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")  # one file
        files = {"weights.safetensors": (folder / "model.safetensors").rename(folder / "weights.safetensors")}
        if _is_tied(bare):
            files["head.safetensors"] = folder / "head.safetensors"
            save_file({f"{head}.weight": shared}, folder / "head.safetensors")
        _write_index(folder, files)
        _change_config(folder, bare, vocabulary)
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


def _name(model: Any, layer: Any) -> str:
    """The name of a layer of the model, without PEFT's wrapper."""
    names = [name for name, module in model.named_modules() if module is layer]
    return f"{names[0]}.".replace(_BASE_LAYER, ".").removesuffix(".") if names else ""


def _write_index(folder: Path, files: dict[str, Path]) -> None:
    places: dict[str, str] = {}
    for file, path in files.items():
        with safe_open(path, framework="pt") as content:
            places |= dict.fromkeys(content.keys(), file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _change_config(folder: Path, model: Any, vocabulary: int | None) -> None:
    """Let the configuration say that the head is not tied, and how many tokens there are."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    size = model.get_input_embeddings().weight.shape[0]
    changes = {"tie_word_embeddings": False, "vocab_size": min(size, vocabulary or size)}
    for part in (config, config.get("text_config", {})):
        part.update({key: value for key, value in changes.items() if key in part or part is config})
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
