"""Take some of a model's layers: the configuration and weights of the shorter model, and a check that it is right.

Configurations describe layers in many ways: a list with an entry for each, the indices of some, "the first k", "every
k-th". These are adapted here. Whatever else depends on a layer's index is found by the check: the shorter model must
compute what the whole one computes with its other layers skipped.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")  # the number of layers at the beginning
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "rope_scaling_layers", "hybrid_layer_ids")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
_STACKS = ("layers", "layer", "h", "blocks")  # how a model calls the list of its layers
_MAY_DIFFER = re.compile(r"\w*(layer|block)_?(idx|id|index|number)$|training$|_")  # a layer's index, under its names
_ABOUT_LAYERS = re.compile(r"layer|interval|pattern|period|frequency|every|window|replace")


def config_of_layers(config: Any, layers: Sequence[int]) -> Any:
    """The configuration of a model with these layers of a model with `config`, in this order.

    Raises:
        ValueError: from the configuration, if it refuses the values.
    """
    content, depth = config.to_dict(), config.num_hidden_layers
    changes: dict[str, Any] = {
        name: type(value)(value[layer] for layer in layers)
        for name, value in content.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and name not in (*_INDICES, *_TOKENS)
    }
    for name, value in content.items():
        if name.endswith("pattern") and isinstance(value, str) and len(value) == depth:
            changes[name] = "".join(value[layer] for layer in layers)
    for name in _INDICES:
        if isinstance(content.get(name), list):
            changes[name] = [new for new, old in enumerate(layers) if old in content[name]]
    for name in _FIRST:
        if isinstance(content.get(name), int):
            changes[name] = sum(layer < content[name] for layer in layers)
    changes |= _periods(content, layers) | _named_kinds(config, content, layers)
    for name in ("num_hidden_layers", "decoder_layers"):
        name = config.attribute_map.get(name, name)
        if name in content:
            changes[name] = len(layers)
    result = type(config).from_dict({**content, **changes})
    result.num_hidden_layers = len(layers)
    return result


def _periods(content: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Settings of the form "every k-th layer" for the layers that are kept."""
    changes: dict[str, Any] = {}
    step = content.get("decoder_sparse_step")
    if step and isinstance(content.get("mlp_only_layers"), list):
        dense = [layer in content["mlp_only_layers"] or (layer + 1) % step > 0 for layer in layers]
        changes = {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, is_dense in enumerate(dense) if is_dense]}
    for name in [name for name in content if name.endswith("_period")]:
        offset = name.replace("_period", "_offset")
        if content.get(name) and offset in content:
            chosen = [layer % content[name] == content[offset] for layer in layers]
            changes[name], changes[offset] = _period_of(chosen) or (content[name], content[offset])
    if step := content.get("moe_layer_interval"):
        first, last = content["moe_layer_start_index"], content["moe_layer_end_index"]
        sparse = [new for new, old in enumerate(layers) if (old + 1) % step == 0 and first <= old <= last]
        first, last = (sparse[0], sparse[-1]) if sparse else (len(layers), len(layers))
        changes |= {"moe_layer_interval": 1, "moe_layer_start_index": first, "moe_layer_end_index": last}
    return changes


def _period_of(chosen: Sequence[bool]) -> tuple[int, int] | None:
    """The smallest period and offset that choose these layers; None if there are none."""
    pairs = ((period, offset) for period in range(1, len(chosen) + 2) for offset in range(period))
    return next((p for p in pairs if all((i % p[0] == p[1]) == c for i, c in enumerate(chosen))), None)


def _named_kinds(config: Any, content: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Kinds of layers that a configuration gives by a pattern of its own: RecurrentGemma's and GPT-Neo's."""
    if "block_types" in content:
        kinds = list(content["block_types"])
        return {"block_types": [kinds[layer % len(kinds)] for layer in layers]}
    if "attention_types" in content:
        return {"attention_types": [[[config.attention_layers[layer]], 1] for layer in layers]}
    return {}


def take_layers(model: nn.Module, shorter: nn.Module, layers: Sequence[int]) -> None:
    """Copy the weights of these layers of `model`, and of everything around them, to `shorter`, and check the result.

    Raises:
        ValueError: if the layers cannot be identified, or if the shorter model is another one than `model` without its
            other layers, naming the settings that depend on a layer's index.
    """
    name = _stack(model, shorter, len(layers))
    prefix, weights = f"{name}.", model.state_dict()
    taken = {key: weight for key, weight in weights.items() if not key.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        taken |= {f"{prefix}{new}.{k.removeprefix(start)}": w for k, w in weights.items() if k.startswith(start)}
    config: Any = model.config
    expected = shorter.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | taken.keys()
        if key not in expected or key not in taken or expected[key].shape != taken[key].shape
    )
    if wrong:
        raise _refused(config, [], f"{len(wrong)} weights differ, such as {wrong[0]}")
    shorter.load_state_dict(taken)
    stack: Any = model.get_submodule(name)
    shorter_stack: Any = shorter.get_submodule(name)
    different = {key for new, old in enumerate(layers) for key in _different_settings(stack[old], shorter_stack[new])}
    if different:
        raise _refused(config, sorted(different))
    in_order = all(a < b for a, b in pairwise(layers))
    pairs = [(list(layers), list(range(len(layers))))] if in_order else [([old], [n]) for n, old in enumerate(layers)]
    for old, new in pairs:
        if not _same_logits(model, stack, old, shorter, shorter_stack, new):
            raise _refused(config, [], "its code reads the index of a layer")


def _stack(model: Any, shorter: nn.Module, count: int) -> str:
    """The name of the list of layers."""
    depth = model.config.get_text_config().num_hidden_layers
    sizes = {name: len(m) for name, m in shorter.named_modules() if isinstance(m, nn.ModuleList)}
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    stacks = [name for name in lists if sizes.get(name) == count and not any(name.startswith(f"{o}.") for o in lists)]
    stacks = [name for name in stacks if name.rpartition(".")[2] in _STACKS] or stacks
    if len(stacks) != 1:
        raise ValueError(f"the list of layers of a {model.config.model_type} cannot be identified; use a fresh student")
    return stacks[0]


def _refused(config: Any, settings: list[str], reason: str = "") -> ValueError:
    """The error, with the settings of a layer that differ, or else those of the configuration that are about layers."""
    about = [name for name, value in config.get_text_config().to_dict().items() if value and _ABOUT_LAYERS.search(name)]
    names = settings or [name for name in about if name not in ("num_hidden_layers", "n_layer", "decoder_layers")]
    names = [name for name in names if "norm" not in name]
    settings_text = f" (see {', '.join(names)})" if names else ""
    return ValueError(
        f"{config.model_type} models of these layers alone differ from the teacher without its other layers, because "
        f"what a layer is depends on its index{settings_text}{': ' * bool(reason)}{reason}; choose other layers, or a "
        "fresh student"
    )


def _different_settings(layer: nn.Module, copy: nn.Module) -> Iterator[str]:
    """The names of the settings in which a layer and its copy differ, besides their index."""
    modules, copies = dict(layer.named_modules()), dict(copy.named_modules())
    if modules.keys() != copies.keys():
        yield from sorted(name for name in modules.keys() ^ copies.keys() if "." not in name)
        return
    for name, module in modules.items():
        values, others = vars(module), vars(copies[name])
        for key in values.keys() | others.keys():
            value, other = values.get(key), others.get(key)
            if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
                value, other = list(value), list(other)
                if len(value) != len(other):
                    continue  # it has an entry for each layer of the model
            is_setting = isinstance(value, (bool, int, float, str, list, type(None)))
            if is_setting and not _MAY_DIFFER.match(key) and value != other:
                yield key
        for key, buffer in module.named_buffers(recurse=False):
            other = dict(copies[name].named_buffers(recurse=False)).get(key)
            if other is None or not torch.equal(buffer, other):
                yield key


@torch.no_grad()
def _same_logits(
    model: Any, stack: Any, kept: list[int], shorter: Any, shorter_stack: Any, shorter_kept: list[int]
) -> bool:
    """Do two models compute the same logits with only these layers of each?"""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (1, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    results = []
    for whole, layers, indices in ((model, stack, kept), (shorter, shorter_stack, shorter_kept)):
        was_training = whole.training
        whole.eval()
        try:
            with skipped(layers, [index for index in range(len(layers)) if index not in indices]):
                results.append(whole(input_ids=ids, use_cache=False).logits.float())
        finally:
            whole.train(was_training)
    expected, logits = results
    tolerance = 1e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def skipped(stack: nn.ModuleList, indices: Sequence[int]) -> Iterator[None]:
    """Within this block, layers with these indices return their input. They are run for what else they return."""
    handles = [stack[index].register_forward_hook(_identity, with_kwargs=True) for index in indices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identity(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args and isinstance(args[0], Tensor) else kwargs["hidden_states"]
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
