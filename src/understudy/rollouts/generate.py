"""Responses written by a decode loop in this process, for any causal language model with a key-value cache.

Shapes: R rows being written.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fused_linear.tiles import current_tiling
from ..generation.decoder import CompiledDecoder, Decoder
from ..generation.sampling import SamplingRollout, writing

_ALIVE = 0.75  # finished rows are dropped once fewer than this share of the batch is still being written


@dataclass
class GenerateRollout(SamplingRollout):
    """Writes prompts of like length together; rows that are finished leave the batch."""

    name: ClassVar[str] = "generate"

    compiled: bool | None = None  # the forward of a token; default: where a run is long enough for its loss to be, too

    def _respond(self, prompts: list[list[int]], uniforms: Tensor) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: dict[int, list[int]] = {}
        with writing(self._model):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                responses |= zip(part, self._write([prompts[i] for i in part], uniforms[part]), strict=True)
        return [responses[i] for i in range(len(prompts))]

    def _write(self, prompts: list[list[int]], uniforms: Tensor) -> list[list[int]]:
        """A response to each of R prompts; `uniforms` (R, max_new_tokens)."""
        device = self._model.get_input_embeddings().weight.device
        most = self.max_new_tokens
        uniforms = uniforms.to(device)
        stops = torch.zeros(max(self._vocabulary, *self._stop) + 1, dtype=torch.bool, device=device)
        stops[self._stop] = True
        written = torch.zeros(len(prompts), most, dtype=torch.long, device=device)
        rows = torch.arange(len(prompts), device=device)  # which response each row of the batch writes
        going = torch.ones(len(prompts), dtype=torch.bool, device=device)
        decoder = (CompiledDecoder if self._compiles() else Decoder)(self._model, prompts, most)
        logits = decoder.prompts()
        for position in range(most):
            tokens = self._draw(logits, uniforms[:, position])
            written[rows, position] = tokens
            going &= ~stops[tokens]
            alive = int(going.sum())
            if alive == 0 or position == most - 1:
                break
            if alive < _ALIVE * len(rows) and len(rows) > 2:
                keep = going.sort(descending=True, stable=True).indices[: max(alive, 2)]
                if decoder.drop(keep):
                    rows, tokens, going, uniforms = rows[keep], tokens[keep], going[keep], uniforms[keep]
            logits = decoder.tokens(tokens)
        stop = set(self._stop)
        return [_to_its_end(row, stop) for row in written[:, : position + 1].tolist()]

    def _compiles(self) -> bool:
        return current_tiling().compiled if self.compiled is None else self.compiled


def _to_its_end(tokens: list[int], stop: set[int]) -> list[int]:
    """Up to and with the first stop token; a row that was finished may have been written on."""
    end = next((i for i, token in enumerate(tokens, 1) if token in stop), None)
    return tokens[:end]
