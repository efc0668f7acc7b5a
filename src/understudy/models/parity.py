"""Parity check: does the fused path compute a model's own logits?"""

import logging
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Example
from ..fused_linear.distributions import Projected
from ..scores import Scores
from .adapters import without_adapters
from .forward import score
from .logits import is_linear_head
from .sharding import is_shard

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()  # model classes and reasons


def can_fuse(model: Any) -> bool:
    """Can the loss be computed from hidden rows and head? bfloat16 rounding stays below the threshold.

    Logs once for each class of models why it cannot.
    """
    try:
        difference = logit_difference(model)
        reason = "the model transforms its logits in a way that is not known here"
    except FusedForwardError as error:
        difference, reason = float("inf"), f"the model's forward fails with the loss in place of logits: {error}"
    if difference < 1e-2:
        return True
    head = model.get_output_embeddings()
    if not is_linear_head(head):
        reason = f"its head, {type(head).__name__}, is not a plain linear layer in memory"
    log_plain_path(model, reason)
    return False


def can_fuse_after_forward(model: Any) -> bool:
    """`can_fuse` for a loss that is computed after the model's forward, when weights that it gathered are gone."""
    if (head := model.get_output_embeddings()) is not None and any(map(is_shard, head.parameters())):
        log_plain_path(model, "the weights of its head are gathered only during a forward")
        return False
    return can_fuse(model)


def log_plain_path(model: Any, reason: str) -> None:
    """Log, once for each class and reason, that a model's loss is computed from its own logits."""
    name = type(without_adapters(model)).__name__
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.warning(
            "%s computes the logits of all positions at once, which takes more memory and time than the fused loss: %s",
            name,
            reason,
        )


class FusedForwardError(Exception):
    """A model's forward failed with another tensor in place of its logits."""


@torch.no_grad()
def logit_difference(model: Any, token: int = 0) -> float:
    """The largest difference between the model's own logits and those of the fused path, relative to their size.

    A model that transforms its logits in an unknown way shows a difference, and must take the plain path. A soft-cap
    hardly changes the small logits of a new model, so numbers of the size of a loss are returned through the forward as
    well, which must not change them.

    Raises:
        FusedForwardError: if the model's forward fails with another tensor in place of its logits.
    """
    if not is_linear_head(model.get_output_embeddings()):
        return float("inf")
    device = model.get_input_embeddings().weight.device
    example = Example([token], [token + 1, token + 2, token])
    batch = Batch.from_examples([example], pad=0, device=device)
    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        own = own[0, :-1].float()
        try:
            fused = score(model, batch, _logits).float()
            numbers = torch.tensor([-100.0, 0.01, 1.0, 10.0, 1000.0], device=fused.device)
            returned = score(model, batch, lambda scores: numbers).float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # forwards raise anything
            raise FusedForwardError(str(error).partition("\n")[0]) from error
    finally:
        model.train(was_training)
    if own.shape != fused.shape or numbers.shape != returned.shape:
        return float("inf")
    difference = float((own - fused.to(own.device)).abs().max() / own.abs().max().clamp(min=1e-6))
    return max(difference, float(((returned.to(numbers.device) - numbers) / numbers).abs().max()))


def _logits(scores: Scores) -> Tensor:
    assert isinstance(scores.distribution, Projected)
    return scores.distribution.head(scores.distribution.hidden)
