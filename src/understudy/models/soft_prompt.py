"""Soft prompts: the embeddings that a model gives to tokens, and the check that it reads embeddings as those tokens.

Shapes: m tokens of a prompt, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Example
from .forward import score_no_grad


@torch.no_grad()
def token_embeddings(model: Any, ids: Sequence[int]) -> Tensor:
    """(m, D) what the model's layers receive for these tokens.

    Some families scale or normalise the rows of the embedding matrix (Gemma multiplies by √D), in the module itself.
    """
    layer = model.get_input_embeddings()
    return layer(torch.tensor(ids, dtype=torch.long, device=layer.weight.device)[None])[0].detach()


@torch.no_grad()
def check_soft_prompt(model: Any) -> None:
    """Refuse a model that does not read a prompt of two tokens' embeddings as it reads the tokens.

    Some families look up further things by token id, such as embeddings of every layer. Gemma 3n and 4 search the token
    that an embedding belongs to, and fail with embeddings of no token.

    Raises:
        ValueError: with the reason and the remedy.
    """
    weight = model.get_input_embeddings().weight
    prompt, a, b, c = _spread(len(weight), 5)[:2], *_spread(len(weight), 5)[2:]
    examples = [Example([a], [b, c, a]), Example([c, b, c], [a])]
    batch, longer = (
        Batch.from_examples([Example([*prefix, *e.prompt], e.response) for e in examples], 0, weight.device)
        for prefix in ([], prompt)
    )
    expected = score_no_grad(model, longer, fused=False).log_probs
    try:
        soft_prompt = token_embeddings(model, prompt)
        log_probs = score_no_grad(model, batch, fused=False, soft_prompt=soft_prompt).log_probs
        score_no_grad(model, batch, fused=False, soft_prompt=1.1 * soft_prompt)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # forwards raise anything
        raise _refusal(model, f"it fails with “{error}”") from error
    difference = float((log_probs - expected).abs().max())
    if not difference <= (1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.2):
        raise _refusal(model, f"the embeddings of two tokens change log-probabilities by {difference:.2g} against them")


def _spread(vocabulary: int, count: int) -> list[int]:
    """`count` ids that are spread over the vocabulary, without the first and the last one."""
    return [vocabulary * (i + 1) // (count + 1) for i in range(count)]


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(
        f"a soft prompt cannot be put before the texts of {type(model).__name__}, which does not read embeddings as "
        f"it reads tokens: {reason}; choose a teacher of another family, method gkd, or prompt_tokens: 0"
    )
