"""The load-balancing loss of a mixture of experts' router, in models whose configuration asks for it."""

from typing import Any

import torch
from torch import Tensor

from .adapters import without_adapters

_NAMES = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoE has the second


def router_coefficient(model: Any) -> float | None:
    """The coefficient of the router's loss; None where `output_router_logits` does not ask for this loss.

    Raises:
        ValueError: for a model that has no such coefficient, or does not compute the loss of a few tokens.
    """
    inner = without_adapters(model)
    config = getattr(inner, "config", None)
    if config is None or not getattr(config.get_text_config(), "output_router_logits", False):
        return None
    for owner in (inner, config.get_text_config(), config):
        for name in _NAMES:
            if isinstance(getattr(owner, name, None), int | float):
                _try(model)
                return float(getattr(owner, name))
    raise _no_loss(model)


@torch.no_grad()
def _try(model: Any) -> None:
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    was_training = model.training
    model.eval()
    try:
        router_loss(model, model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # forwards raise anything
        raise _no_loss(model) from error
    finally:
        model.train(was_training)


def router_loss(model: Any, output: Any) -> Tensor:
    """The router's loss in the output of a forward.

    Raises:
        ValueError: if there is none.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise _no_loss(model)
    return loss


def _no_loss(model: Any) -> ValueError:
    name = type(without_adapters(model)).__name__
    return ValueError(
        f"output_router_logits asks for the router's loss, and {name} does not compute it: set output_router_logits to "
        "false in the student's configuration"
    )
