"""A teacher in this process: any causal language model of transformers, frozen."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ..batch import Batch
from ..models.forward import score_constant
from ..models.load import ModelSource, load_model
from ..models.parity import can_fuse_after_forward
from ..models.sharding import is_sharded, shard_layers
from ..scores import Scores
from ..teacher import Capability, Teacher


class LocalTeacher(Teacher):
    """Scores each micro-batch just before the student needs it, without gradients.

    The model has its own dtype, quantisation and device, independent of the student's. Only hidden states (N, D) are
    stored between its forward and the loss, which projects them onto the vocabulary tile by tile.

    Args:
        model: the teacher, or a name or folder to load it from when it is first used.
        dtype, device: where a named model is loaded to; by default in its checkpoint's dtype, on the student's device.
        quantization: fields of transformers' `BitsAndBytesConfig`.
        options: further keyword arguments of `from_pretrained`, such as `revision` or `attn_implementation`.
        shard: shard the layers over all processes (FSDP2), whatever the student is trained with. Embeddings and head
            stay whole, so that the fused loss and soft prompts work as they do otherwise.
    """

    provides: ClassVar[frozenset[Capability]] = frozenset(Capability)

    def __init__(
        self,
        model: nn.Module | str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        quantization: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        shard: bool = False,
    ) -> None:
        if shard and (device is not None or quantization is not None):
            raise ValueError("a sharded teacher is on all devices, unquantized: leave device and quantization out")
        self._shard = shard
        self.model_name = model if isinstance(model, str) else None
        if isinstance(model, str):
            self.source = ModelSource(model, dtype, device, quantization, options or {})
        self._model: Any = None if isinstance(model, str) else _frozen(model)
        self._dtype, self._device, self._quantization, self._options = dtype, device, quantization, options or {}

    @property
    def model(self) -> Any:
        """The model, frozen and in evaluation mode.

        Raises:
            RecipeError: if it cannot be loaded, with the remedy.
        """
        if self._model is None:
            self._model = _frozen(self._load())
        return self._model

    @cached_property
    def fused(self) -> bool:
        """Can the loss use its head? Not if that is gathered only during a forward (FSDP2, ZeRO-3)."""
        return can_fuse_after_forward(self.model)

    @property
    def is_collective(self) -> bool:
        return self._shard or (self._model is not None and is_sharded(self._model))

    def to(self, device: torch.device) -> None:
        if self._shard:
            return shard_layers(self.model, device)
        if self._device is None and self._quantization is None and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)

    def score(self, batch: Batch) -> Scores:
        batch = batch.as_read_by_teacher().to(self.model.device)
        return score_constant(self.model, batch, self.fused, in_parts=not self.is_collective)

    def _load(self) -> nn.Module:
        from transformers import BitsAndBytesConfig

        assert self.model_name is not None
        options = dict(self._options)
        if self._quantization is not None:
            options["quantization_config"] = BitsAndBytesConfig(**self._quantization)
        if self._device is not None:
            options["device_map"] = self._device
        return load_model(self.model_name, dtype=self._dtype, **options)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
