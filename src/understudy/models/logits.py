"""Scale and soft-cap of a model's logits, switched off while the loss is computed in place of the logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import nn

from ..fused_linear.head import Transform
from .adapters import without_adapters

_changed_configs: set[int] = set()  # the ids of configurations inside `without_logit_transform`


def is_linear_head(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Is this output embedding a plain linear layer whose weight can be used directly?"""
    return isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and not hasattr(layer, "_hf_hook")


@contextmanager
def without_logit_transform(model: Any) -> Iterator[Transform]:
    """Switch off the model's scale and soft-cap within this block; yields the Transform that it would have applied.

    Models define this in different places: Gemma caps (`final_logit_softcapping`), Granite divides and HyperCLOVA X
    multiplies (`logits_scaling`), Cohere multiplies (`logit_scale`, read when the model is built).
    """
    refuse_nested_forward(model)
    config = model.config.get_text_config()
    neutral: list[tuple[Any, str, Any]] = [
        (config, "final_logit_softcapping", None),
        (config, "logits_scaling", 1.0),
        (without_adapters(model), "logit_scale", 1.0),
    ]
    settings = {
        name: (owner, getattr(owner, name), off)
        for owner, name, off in neutral
        if getattr(owner, name, None) is not None
    }
    scale = float(settings["logit_scale"][1]) if "logit_scale" in settings else 1.0
    if "logits_scaling" in settings:
        factor = float(settings["logits_scaling"][1])
        scale = scale * factor if config.model_type.startswith("hyperclovax") else scale / factor
    softcap = float(settings["final_logit_softcapping"][1]) if "final_logit_softcapping" in settings else None
    try:
        if settings:
            _changed_configs.add(id(config))
        for name, (owner, _, off) in settings.items():
            setattr(owner, name, off)
        yield Transform(scale, softcap)
    finally:
        for name, (owner, value, _) in settings.items():
            setattr(owner, name, value)
        _changed_configs.discard(id(config))


def refuse_nested_forward(model: Any) -> None:
    """Refuse to run a model whose configuration `without_logit_transform` has changed: its logits would be wrong.

    Raises:
        RuntimeError: for such a model, or another one that shares its configuration.
    """
    config = getattr(model, "config", None)
    if config is not None and id(config.get_text_config()) in _changed_configs:
        raise RuntimeError(
            "a model was run inside another's forward while sharing its configuration, whose logit scaling is switched "
            "off there; score the teacher before the student, or give it a configuration of its own (copy.deepcopy)"
        )
