"""A student's weights in a folder that vLLM reads: the whole model with an untied head, or LoRA adapters alone.

vLLM (0.32, on a CPU) keeps a copy of a tied head that it does not renew when weights are reloaded. So the head is
written beside the embeddings, and the configuration says that the two are not tied.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..method import process_rank
from ..models.sharding import is_shard

_MEMORY = Path("/dev/shm")
_PREFIX, _LOCK = "understudy-weights-", "lock"
_BASE_LAYER = ".base_layer."  # in the names of weights that PEFT has wrapped
_LORA = ".lora_"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be started with


class WeightFolder:
    """A temporary folder for one student's weights, in memory where the system has room for them there.

    Folders that killed processes have left in the same place are removed.

    Args:
        parent: where to create it, for a server that shares only that folder with this machine.
        size: bytes of the weights.
    """

    def __init__(self, parent: str | None = None, size: int = 0) -> None:
        place = Path(parent or (_MEMORY if _has_room(_MEMORY, size) else tempfile.gettempdir()))
        _remove_abandoned(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._lock = FileLock(self.path / _LOCK, thread_local=False)
        self._lock.acquire()
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)  # also when Python ends

    @property
    def model(self) -> Path:
        return self.path / "model"

    def adapters_of(self, model: Any) -> Path:
        """Where PEFT saves the adapters of a model."""
        name = _adapter(model)
        return self.path / "adapters" / ("" if name == "default" else name)

    def write_model(self, bare: Any, weights: dict[str, Tensor], vocabulary: int | None = None) -> Path:
        """Write a model over what was written before.

        Args:
            bare: the model, of one with adapters the part below them.
            weights: its own, as `model_weights` returns them.
            vocabulary: tokens of the tokenizer, to which a padded vocabulary is cut; None: all are written.
        """
        folder = self.model
        weights = {name.replace(_BASE_LAYER, "."): weight for name, weight in weights.items()}
        embeddings, head = (_name(bare, layer()) for layer in (bare.get_input_embeddings, bare.get_output_embeddings))
        for name in [name for name in weights if name.rpartition(".")[0] in (embeddings, head)]:
            weights[name] = weights[name][:vocabulary]
        shared = weights[f"{embeddings}.weight"].contiguous()
        with _without_progress_bars():
            bare.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")  # one file
        files = {"weights.safetensors": (folder / "model.safetensors").rename(folder / "weights.safetensors")}
        if _is_tied(bare):
            files["head.safetensors"] = folder / "head.safetensors"
            save_file({f"{head}.weight": shared}, folder / "head.safetensors")
        _write_index(folder, files)
        _change_config(folder, len(shared))
        return folder

    def write_adapters(self, model: Any, weights: dict[str, Tensor]) -> Path:
        """Write the adapters of a model over those written before; `weights` as `adapter_weights` returns them."""
        names = [_adapter(model)]
        folder = self.path / "adapters"
        model.save_pretrained(folder, state_dict=weights, selected_adapters=names, save_embedding_layers=False)
        return self.adapters_of(model)


def model_weights(bare: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, without those of adapters; see `_weights_of`."""
    return _weights_of(bare, lambda name: _LORA not in name)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's LoRA adapters by name; see `_weights_of`."""
    return _weights_of(model, lambda name: _LORA in name)


@torch.no_grad()
def _weights_of(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """A model's weights as its `state_dict` has them, those with `wanted` names, on the first process; {} on others.

    All processes call it together. Of a sharded model they gather one weight after the other, which the first process
    keeps in main memory, so that no device has to hold the whole model.
    """
    weights: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}  # a tied weight is gathered once
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, weight in {**module._parameters, **buffers}.items():
            name = f"{prefix}.{key}".removeprefix(".")
            if weight is None or not wanted(name):
                continue
            if is_shard(weight):
                if id(weight) not in gathered:
                    gathered[id(weight)] = _whole(weight)
                weight = gathered[id(weight)]
            if process_rank() == 0:
                weights[name] = weight.detach()
    return weights


def _whole(weight: Any) -> Tensor:
    """A sharded weight in main memory; empty in other processes than the first."""
    if hasattr(weight, "full_tensor"):
        whole = weight.full_tensor()
        return whole.cpu() if process_rank() == 0 else whole.new_empty(0)
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().cpu().clone() if process_rank() == 0 else weight.new_empty(0)


def check_adapters(model: Any) -> bool:
    """Does the student have LoRA adapters?

    Raises:
        ValueError: for adapters that vLLM cannot load, and weights beside them that are trained and would not be sent.
    """
    configs = getattr(model, "peft_config", {})
    if not configs:
        return False
    config, remedy = configs[_adapter(model)], "or use rollout generate"
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"vllm serves LoRA adapters, and none of the kind {kind}: use LoRA, {remedy}")
    for field in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            raise ValueError(f"vllm does not serve LoRA adapters with {field}: leave it out, {remedy}")
    others = [name for name, weight in model.named_parameters() if weight.requires_grad and _LORA not in name]
    if others:
        raise ValueError(
            f"vllm gets the adapters alone, and {others[0]} is trained beside them: freeze it (a bias by bias: none), "
            f"{remedy}"
        )
    return True


def adapter_rank(model: Any) -> int:
    """The smallest `--max-lora-rank` for the student's adapters."""
    config = model.peft_config[_adapter(model)]
    rank = max([config.r, *config.rank_pattern.values()])
    return next((size for size in _RANKS if size >= rank), rank)


def _adapter(model: Any) -> str:
    """The name of the adapters in use.

    Raises:
        ValueError: if several are, or one of several.
    """
    if len(model.peft_config) > 1:
        raise ValueError("vllm serves one set of the student's adapters: delete the others, or use rollout generate")
    return next(iter(model.peft_config))


def _has_room(place: Path, size: int) -> bool:
    """Is there a folder, and room in it for weights that are replaced by others, of `size` bytes each?"""
    with suppress(OSError):
        return shutil.disk_usage(place).free > 2.2 * size
    return False


def _remove_abandoned(place: Path) -> None:
    """Remove the folders of processes that were killed: no process holds their locks."""
    for lock in place.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError, Timeout), FileLock(lock, timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


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


def _change_config(folder: Path, vocabulary: int) -> None:
    """Let the configuration say that the head is not tied, and how many tokens there are."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    changes = {"tie_word_embeddings": False, "vocab_size": vocabulary}
    for part in (config, config.get("text_config", {})):
        part.update({key: value for key, value in changes.items() if key in part or part is config})
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
