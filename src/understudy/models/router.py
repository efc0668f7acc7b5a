"""The load-balancing loss of a mixture of experts' router, in models whose configuration asks for it."""

from typing import Any

from torch import Tensor

from .adapters import without_adapters

_NAMES = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoE has the second


def router_coefficient(model: Any) -> float | None:
    """The coefficient of the router's loss; None where `output_router_logits` does not ask for this loss.

    Raises:
        ValueError: for a model that has no such coefficient.
    """
    inner = without_adapters(model)
    config = getattr(inner, "config", None)
    if config is None or not getattr(config.get_text_config(), "output_router_logits", False):
        return None
    for owner in (inner, config.get_text_config(), config):
        for name in _NAMES:
            if isinstance(getattr(owner, name, None), int | float):
                return float(getattr(owner, name))
    raise _no_loss(inner)


def router_loss(model: Any, output: Any) -> Tensor:
    """The router's loss in the output of a forward.

    Raises:
        ValueError: if there is none.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise _no_loss(without_adapters(model))
    return loss


def _no_loss(model: Any) -> ValueError:
    return ValueError(
        f"output_router_logits asks for the router's loss, and {type(model).__name__} does not compute it: set "
        "output_router_logits to false in the student's configuration"
    )
