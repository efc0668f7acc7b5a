"""A teacher in this process: any causal language model of transformers, frozen."""

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..batch import Batch
from ..fused_linear.distributions import Projected
from ..scores import Knowledge, Scores, can_project, opinion
from ..teacher import Teacher

_PIECE = 1024  # padded tokens that a CPU reads at once: what lies between a model's layers stays in its cache


class LocalTeacher(Teacher):
    """Scores each micro-batch just before the student needs it, without gradients.

    The model keeps its own dtype, quantisation and device; nothing of the student's settings reaches it. Only hidden
    states (N, D) are kept between its forward and the loss; the vocabulary is projected chunk by chunk there.

    Args:
        model: the teacher, or a name or folder to load it from.
        vocabulary: how many tokens are real (`len(tokenizer)`), where the model pads its vocabulary beyond them.
        dtype, device: where a named model is loaded to; by default in its checkpoint's dtype, beside the student.
        quantization: fields of transformers' `BitsAndBytesConfig`.
        options: further keyword arguments of `from_pretrained`, such as `revision` or `attn_implementation`.
    """

    gives: ClassVar[Knowledge] = Knowledge.MODEL

    def __init__(
        self,
        model: nn.Module | str,
        *,
        vocabulary: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = _load(model, dtype, device, quantization, options or {})
        self.model: Any = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self._placed = device is not None or quantization is not None or hasattr(model, "hf_device_map")
        self.projects = not _is_sharded(model) and can_project(model)

    def beside(self, device: torch.device) -> None:
        if not self._placed:
            self.model.to(device)

    def score(self, batch: Batch) -> Scores:
        batch = batch.to(self.model.device)
        if not self.projects or batch.input_ids.device.type != "cpu":
            return self._opinion(batch)
        pieces, places = zip(*batch.pieces(_PIECE), strict=True)
        sources = [cast(Projected, self._opinion(piece).source) for piece in pieces]
        hidden = torch.cat([source.hidden for source in sources])[torch.cat(places).argsort()]
        return Scores(batch.tokens, replace(sources[0], hidden=hidden))

    def _opinion(self, batch: Batch) -> Scores:
        return opinion(self.model, batch, vocabulary=self.vocabulary, project=self.projects)


def _load(
    name: str, dtype: str, device: str | None, quantization: dict[str, Any] | None, options: dict[str, Any]
) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if quantization is not None:
        options = {**options, "quantization_config": BitsAndBytesConfig(**quantization)}
    if device is not None:
        options = {**options, "device_map": device}
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)


def _is_sharded(model: nn.Module) -> bool:
    """Are the weights gathered only during a forward (FSDP2, ZeRO-3), so that the head cannot be kept for later?"""
    return any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())
