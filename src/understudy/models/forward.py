"""Score a batch with a model: compute a loss inside its forward, in place of the logits.

For the duration of one forward, the loss replaces the output embedding's own forward: from the hidden states it takes
the rows that predict a response token, and its value is returned in place of the logits. So prompts and padding are
never projected onto the vocabulary, and wrappers of the model (DDP, FSDP2, DeepSpeed, PEFT) see an ordinary forward.

Shapes: N response tokens, V vocabulary, D width, m tokens of a soft prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..fused_linear.distributions import Dense, Projected
from ..fused_linear.head import Head, softmax_dtype
from ..scores import Scores
from .inputs import model_inputs
from .logits import is_linear_head, refuse_nested_forward, without_logit_transform
from .router import router_loss

_PART = 1024  # padded tokens per constant forward on a CPU


def score(
    model: Any,
    batch: Batch,
    then: Callable[[Scores], Tensor],
    *,
    unwrapped: Any = None,
    vocabulary: int | None = None,
    weights: Tensor | None = None,
    fused: bool = True,
    soft_prompt: Tensor | None = None,
    router: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run `model` on the batch, call `then` on its Scores inside the forward, and return what `then` returns.

    Args:
        model: a causal language model of transformers, wrapped or not.
        then: from Scores to the tensor that takes the logits' place, a loss for instance. It runs inside the model's
            forward, so that other models (the teacher) are best scored before.
        unwrapped: the model without its wrappers, which has the output embeddings (default: `model`).
        vocabulary: the number of real tokens; the padding of a vocabulary beyond them is left out of the softmax.
        weights: (N,) row weights of the loss, for the Scores; None where they are known only after the loss.
        fused: compute the loss from hidden rows and head. If False, or if the head is not a plain linear layer, the
            model computes its own logits (B, T, V) and the loss is computed from them.
        soft_prompt: (m, D) embeddings before every sequence. Scores are of the same N tokens as without.
        router: from the load-balancing loss of a mixture of experts to a term that is added to the result.

    Raises:
        ValueError: if there is a `router` and the model computes no such loss.
        RuntimeError: if called inside the `then` of another model that shares this model's configuration object.
    """
    unwrapped = model if unwrapped is None else unwrapped
    inputs, predicts = model_inputs(unwrapped, batch, soft_prompt)
    layer = unwrapped.get_output_embeddings() if fused else None
    if not is_linear_head(layer):
        refuse_nested_forward(unwrapped)
        output = model(**inputs)
        logits = output.logits[predicts.to(output.logits.device)][:, :vocabulary]
        log_probs = logits.to(softmax_dtype(logits.dtype)).log_softmax(-1)
        return _with_router(then(Scores(batch.tokens, Dense(log_probs), weights)), unwrapped, output, router)

    with without_logit_transform(unwrapped) as transform:

        def loss_instead_of_logits(hidden: Tensor) -> Tensor:
            head = Head(layer.weight, layer.bias, transform)
            head = head if vocabulary is None else head.cut(vocabulary)
            return then(Scores(batch.tokens, Projected(hidden[predicts.to(hidden.device)], head), weights))

        with replaced_forward(layer, loss_instead_of_logits):
            output = model(**inputs)
    return _with_router(output.logits, unwrapped, output, router)


def _with_router(result: Tensor, model: Any, output: Any, router: Callable[[Tensor], Tensor] | None) -> Tensor:
    return result if router is None else result + router(router_loss(model, output)).to(result.device)


@torch.no_grad()
def score_no_grad(model: Any, batch: Batch, **options: Any) -> Scores:
    """A model's Scores as constants: without gradients, and outside any autocast.

    Takes the `options` of `score`. The caller must turn off dropout.
    """
    results: list[Scores] = []

    def store(scores: Scores) -> Tensor:
        distribution = scores.distribution  # its head, if it is trained, would be differentiated where it is used
        constant = distribution.detach() if isinstance(distribution, Projected) else distribution
        results.append(replace(scores, distribution=constant))
        return batch.input_ids

    with torch.autocast(batch.input_ids.device.type, enabled=False):
        score(model, batch, store, **options)
    return results[0]


def score_constant(model: Any, batch: Batch, fused: bool, in_parts: bool = True) -> Scores:
    """As `score_no_grad`; on a CPU in parts of similar length, whose activations stay in its cache."""
    if not fused or not in_parts or batch.input_ids.device.type != "cpu":
        return score_no_grad(model, batch, fused=fused)
    parts, indices = zip(*batch.split_by_length(_PART), strict=True)
    distributions = [cast(Projected, score_no_grad(model, part).distribution) for part in parts]
    hidden = torch.cat([distribution.hidden for distribution in distributions])[torch.cat(indices).argsort()]
    return Scores(batch.tokens, replace(distributions[0], hidden=hidden))


@contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the layer's forward, not the layer, so that hooks around it still run, such as gathering of weights."""
    previous = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del layer.forward
        else:
            layer.forward = previous
