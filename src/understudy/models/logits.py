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
    multiplies (`logits_scaling`), Cohere multiplies (`logit_scale`, read when the model is built). A setting that
    cannot be changed, such as a property or a parameter, is left as it is; the parity check tells whether the model
    then still transforms its logits.
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
        if getattr(owner, name, None) is not None and _can_set(owner, name, off)
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
            _set(owner, name, off)
        yield Transform(scale, softcap)
    finally:
        for name, (owner, value, _) in settings.items():
            _set(owner, name, value)
        _changed_configs.discard(id(config))


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, of a configuration without the checks of its type (Gemma 3n's soft-cap must be a number)."""
    if isinstance(owner, nn.Module):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


def _can_set(owner: Any, name: str, value: Any) -> bool:
    previous = getattr(owner, name)
    try:
        _set(owner, name, value)
        changed = getattr(owner, name) == value
        _set(owner, name, previous)
    except (AttributeError, TypeError):
        return False
    return changed


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
