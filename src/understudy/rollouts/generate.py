"""Generate responses by a decode loop in this process, for any causal language model.

Shapes: R rows generated at once.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..fused_linear.tiles import current_tiling
from ..generation.cache_support import cache_support
from ..generation.decoder import CompiledDecoder, Decoder, RecomputingDecoder
from ..generation.sampling import Response, SamplingRollout, check_tokens, draw, generation_mode, log_probs_of
from ..models.twin import is_twin, twin_of
from ..sampling import Sampling

_MIN_UNFINISHED = 0.75  # finished rows are dropped when the share of unfinished rows falls below this


@dataclass
class GenerateRollout(SamplingRollout):
    """Generates responses to prompts of similar length together; finished rows are dropped from the batch."""

    name: ClassVar[str] = "generate"
    runs_ahead: ClassVar[bool] = True

    compiled: bool | None = None  # compile the forward of a token; default: wherever the loss is compiled

    _cancelled: threading.Event | None = field(default=None, init=False, repr=False)

    def for_thread(self, cancelled: threading.Event) -> "GenerateRollout":
        """See `Rollout`: a rollout of a second module that shares the weights' memory, and is not compiled.

        Compiling saves and restores the random generators of the process, which training uses meanwhile.

        Raises:
            ValueError: if `compiled` is true.
        """
        if self.compiled:
            raise ValueError("a rollout that generates ahead is not compiled: set compiled to false, or ahead to 0")
        bound = self._bound
        if bound.twin is None or not is_twin(bound.twin, bound.model):
            bound.twin = twin_of(bound.model)
        rollout = replace(self, compiled=False)
        rollout._binding, rollout._cancelled = replace(bound, model=bound.twin, twin=None), cancelled
        return rollout

    def _respond(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: dict[int, Response] = {}
        with generation_mode(self._bound.model):
            cache_support(self._bound.model, self._bound.vocabulary)  # on every process, also without prompts
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                batch = self._generate([prompts[i] for i in part], uniforms[part], sampling)
                responses |= zip(part, batch, strict=True)
        return [responses[i] for i in range(len(prompts))]

    def _generate(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        """A response to each of R prompts; `uniforms` (R, max_new_tokens)."""
        model, vocabulary, longest = self._bound.model, self._bound.vocabulary, sampling.max_new_tokens
        device = model.get_input_embeddings().weight.device
        uniforms = uniforms.to(device)
        is_stop = torch.zeros(max(vocabulary, *sampling.stop_ids) + 1, dtype=torch.bool, device=device)
        is_stop[list(sampling.stop_ids)] = True
        responses = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        log_probs = torch.zeros(responses.shape, device=device) if sampling.logprobs else None
        rows = torch.arange(len(prompts), device=device)  # the response that each row of the batch belongs to
        unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
        decoder = self._decoder(prompts, longest)
        logits = decoder.prompts()[:, :vocabulary]
        for position in range(longest):
            if self._cancelled is not None and self._cancelled.is_set():
                raise RuntimeError("generating was cancelled")
            tokens = draw(logits, uniforms[:, position], sampling)
            responses[rows, position] = tokens
            unfinished &= ~is_stop[tokens]
            # the only wait for the device in this loop: a GPU is idle from here until the next forward is launched
            smallest, count = torch.stack([tokens.min(), unfinished.sum()]).tolist()
            check_tokens(smallest)
            if log_probs is not None:
                log_probs[rows, position] = log_probs_of(logits, tokens)
            if count == 0 or position == longest - 1:
                break
            if count < _MIN_UNFINISHED * len(rows) and len(rows) > 2:
                keep = unfinished.sort(descending=True, stable=True).indices[: max(count, 2)]
                if decoder.drop(keep):
                    rows, tokens, unfinished, uniforms = rows[keep], tokens[keep], unfinished[keep], uniforms[keep]
            logits = decoder.tokens(tokens)[:, :vocabulary]
        return _until_stop(responses[:, : position + 1], log_probs, sampling)

    def _decoder(self, prompts: list[list[int]], longest: int) -> Decoder | RecomputingDecoder:
        model = self._bound.model
        support = cache_support(model, self._bound.vocabulary)
        if not support.decodes:
            return RecomputingDecoder(model, prompts, longest)
        return (CompiledDecoder if self._compiles() else Decoder)(model, prompts, longest, support.drops_rows)

    def _compiles(self) -> bool:
        return bool(current_tiling().compiled) if self.compiled is None else self.compiled


def _until_stop(tokens: Tensor, log_probs: Tensor | None, sampling: Sampling) -> list[Response]:
    """Each row of tokens (R, T), with its log-probabilities, up to and including its first stop token.

    Decoding may have continued in a finished row.
    """
    stop, responses = set(sampling.stop_ids), []
    values: list[list[float] | None] = [None] * len(tokens) if log_probs is None else log_probs.tolist()
    for row, row_log_probs in zip(tokens.tolist(), values, strict=True):
        end = next((i for i, token in enumerate(row, 1) if token in stop), len(row))
        responses.append(Response(row[:end], None if row_log_probs is None else row_log_probs[:end]))
    return responses
