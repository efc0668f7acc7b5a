"""Memory of one micro-batch and of one rollout, counted while the run's own code runs on tensors without memory.

The model's forward, the fused loss with its tiles and the decoder are those of training. So there is no second formula:
what they allocate is what is counted, with the CPU's operators. GPUs' differ little where attention is not stored.

Shapes: B sequences, N response tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ...divergences import ForwardKL
from ...fused_linear.distributions import Projected
from ...fused_linear.head import Head, softmax_dtype
from ...fused_linear.loss import chosen_log_prob, divergence_loss, row_values
from ...fused_linear.tiles import rows_per_tile, tiling
from ...generation.decoder import Decoder
from ...models.forward import replaced_forward
from ...models.logits import is_linear_head, without_logit_transform
from .peak import PeakMemory

_TILES = (1, 2)  # numbers of tiles at which the loss is measured


@dataclass(frozen=True)
class Lengths:
    """The longest prompt and response in tokens, and how many sequences are trained on and generated at once."""

    prompt: int
    response: int
    sequences: int  # of a micro-batch
    generated: int = 0  # sequences of a rollout; 0: the method generates none


def micro_batch(
    student: Any, teachers: Sequence[Any], lengths: Lengths, arguments: TrainingArguments, vocabulary: int
) -> tuple[int, int]:
    """Bytes of the student's activations and of the loss, for a micro-batch of the longest sequences.

    The loss has the rows' hidden states of all `teachers`, models without weights, the tiles, and the gradients of
    hidden rows and head, which are computed with it.
    """
    student.train()
    if arguments.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs)
    ids = torch.zeros(lengths.sequences, lengths.prompt + lengths.response, dtype=torch.long)
    with _autocast(arguments), tiling(blocks=arguments.device.type == "cpu"):
        with PeakMemory() as forward:
            hidden, head = _hidden(student, ids)
        rows = hidden[:, lengths.prompt - 1 : -1].reshape(-1, hidden.shape[-1])
        if head is not None:
            return forward.peak, _loss_of_rows(rows, head.cut(vocabulary), teachers)
        with PeakMemory() as loss:  # of the model's own logits, (N, V)
            rows[:, :vocabulary].to(softmax_dtype(rows.dtype)).log_softmax(-1)
    return forward.peak, loss.peak


def _loss_of_rows(rows: Tensor, head: Head, teachers: Sequence[Any]) -> int:
    """Bytes of the loss of N rows (N, D). From one tile on it is linear in N, and is not run for all of them."""
    tile, peaks = rows_per_tile(head.vocabulary, rows.device), []
    counts = [len(rows)] if len(rows) <= _TILES[-1] * tile else [tiles * tile for tiles in _TILES]
    for count in counts:
        with PeakMemory() as loss:
            _loss(Projected(rows[:count], head), teachers)
        peaks.append(loss.peak)
    per_row = (peaks[-1] - peaks[0]) / max(counts[-1] - counts[0], 1)
    return peaks[-1] + int(per_row * (len(rows) - counts[-1]))


def _loss(student: Projected, teachers: Sequence[Any]) -> Tensor:
    """The loss of N rows: a divergence from the teachers, or log q of one token."""
    count, vocabulary = len(student.hidden), student.head.vocabulary
    projected = []
    for model in teachers:
        weight = model.get_output_embeddings().weight.detach()
        hidden = torch.empty(count, weight.shape[1], dtype=weight.dtype)
        projected.append(Projected(hidden, Head(weight), constant=True).cut(vocabulary))
    losses = chosen_log_prob(torch.zeros(count, dtype=torch.long))
    if projected:
        losses = divergence_loss(ForwardKL(), projected[0])
    return row_values(student, losses, torch.ones(count))


def _hidden(model: Any, ids: Tensor) -> tuple[Tensor, Head | None]:
    """The last hidden states (B, T, D) and the head, as training sees them; or logits (B, T, V) and None."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    layer = model.get_output_embeddings()
    if not is_linear_head(layer):
        return model(**inputs).logits, None
    with without_logit_transform(model) as transform, replaced_forward(layer, lambda hidden: hidden):
        hidden = model(**inputs).logits
    return hidden, Head(layer.weight, layer.bias, transform)


@torch.no_grad()
def kv_cache(model: Any, lengths: Lengths, arguments: TrainingArguments) -> int:
    """Bytes of the cache of a rollout whose prompts and responses all have the largest length."""
    prompts = [[0] * (lengths.prompt + lengths.response)] * lengths.generated
    with _autocast(arguments), PeakMemory() as memory:
        decoder = Decoder(model.eval(), prompts, longest=1)
        decoder.prompts()
        return memory.live


def _autocast(arguments: TrainingArguments) -> AbstractContextManager[Any]:
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast("cpu", dtype=dtype, enabled=arguments.bf16 or arguments.fp16)
