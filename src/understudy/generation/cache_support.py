"""Check what a model's key-value cache can be used for: decoding a batch of different lengths, dropping rows.

Shapes: R rows, V vocabulary.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..models.adapters import without_adapters
from ..models.context_window import context_window
from .decoder import Decoder, RecomputingDecoder

_log = logging.getLogger(__name__)
_LENGTHS, _LONGEST = (6, 2, 4), 3  # of the prompts that are tried, and of their continuations
_MAX_LOGITS_ERROR = 0.05  # over the standard deviation of the model's own logits …
_MAX_LOGITS_ERROR_HALF = 0.3  # … and in half precision, whose rounding may choose other experts


@dataclass(frozen=True)
class CacheSupport:
    """What a model's cache can be used for."""

    decodes: bool = True  # are the logits of tokens read one by one, after padded prompts, the model's own?
    drops_rows: bool = True


_results: WeakKeyDictionary[Any, CacheSupport] = WeakKeyDictionary()  # by model


@torch.no_grad()
def cache_support(model: Any, vocabulary: int) -> CacheSupport:
    """Try a short batch, once for each model, and log what the cache cannot be used for.

    Caches differ between families: some have none, some cannot read padded prompts or select rows, without saying so.

    Raises:
        ValueError: for a model whose logits depend on later tokens or on padding, so that it cannot generate.
    """
    if model not in _results:
        window = context_window(model.config)
        fits = window is None or window >= max(_LENGTHS) + _LONGEST
        _results[model] = _try(model, vocabulary) if fits else CacheSupport()
    return _results[model]


def _try(model: Any, vocabulary: int) -> CacheSupport:
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(vocabulary, (len(_LENGTHS), max(_LENGTHS) + _LONGEST), generator=torch.Generator()).to(device)
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[..., :vocabulary].float()
    rows, lengths = torch.arange(len(_LENGTHS), device=device), torch.tensor(_LENGTHS, device=device)
    prompts = [ids[row, :length].tolist() for row, length in enumerate(_LENGTHS)]
    name, limit = type(without_adapters(model)).__name__, _error_limit(model)
    expected = torch.stack([own[rows, lengths - 1], own[rows, lengths]])

    def problem_of(decoder: Decoder | RecomputingDecoder) -> str | None:
        logits = [decoder.prompts(), decoder.tokens(ids[rows, lengths])]
        return _difference(torch.stack(logits), expected, limit)

    try:
        problem = problem_of(decoder := Decoder(model, prompts, _LONGEST))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models raise anything
        problem, decoder = _message(error), None
    if problem is not None or decoder is None:
        if without_cache := problem_of(RecomputingDecoder(model, prompts, _LONGEST)):
            raise ValueError(
                f"{name} cannot generate: its logits depend on later tokens or on padding ({without_cache}); choose a "
                "causal model"
            )
        _log.warning(
            "%s cannot generate with a key-value cache: %s. Every token reads the whole sequence again", name, problem
        )
        return CacheSupport(decodes=False)
    keep = rows[[0, 2]]
    try:
        problem = None if decoder.drop(keep) else "its cache has no way to select rows"
        if problem is None:
            problem = _difference(decoder.tokens(ids[keep, lengths[keep] + 1]), own[keep, lengths[keep] + 1], limit)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = _message(error)
    if problem is not None:
        _log.info("finished rows of %s stay in the batch while others are generated: %s", name, problem)
    return CacheSupport(drops_rows=problem is None)


def _error_limit(model: Any) -> float:
    """The largest error of logits for the model's precision; Accelerate sets autocast as `forward` of the instance."""
    weight = model.get_input_embeddings().weight
    exact = weight.dtype in (torch.float32, torch.float64) and "forward" not in vars(model)
    return _MAX_LOGITS_ERROR if exact else _MAX_LOGITS_ERROR_HALF


def _difference(logits: Tensor, expected: Tensor, limit: float) -> str | None:
    """What is wrong with these logits; None: nothing, or the model's own are no numbers, which sampling reports."""
    error, deviation = float((logits[..., : expected.shape[-1]].float() - expected).std()), float(expected.std())
    if error <= limit * deviation or not math.isfinite(deviation):
        return None
    return f"its logits would be off by {error / max(deviation, 1e-9):.0%} of their standard deviation"


def _message(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
