"""Attention of a packed row as FlashAttention computes it, on a CPU: the attention implementation "flash_by_hand".

A position id that does not follow the last begins a sequence. Each sequence attends to itself alone, so that memory
grows with the squared length of the longest sequence, and not of the row.
"""

import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

ATTENTION = "flash_by_hand"


def flash_attention_by_hand(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **options
):
    """Output (1, T, heads, width) of a row of T tokens; `query`, `key` and `value` are (1, heads, T, width)."""
    assert attention_mask is None
    position = options["position_ids"][0]
    begins = (position.diff(prepend=position[:1] - 2) != 1).nonzero()[:, 0].tolist()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    sequences = []
    for begin, end in zip(begins, [*begins[1:], len(position)], strict=True):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        index = torch.arange(end - begin, device=query.device)
        distance = index[:, None] - index
        hidden = (distance < 0) | (distance >= (sliding_window or math.inf))
        scores = q @ k.mT * (scaling or query.shape[-1] ** -0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        sequences.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(sequences, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, flash_attention_by_hand)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
