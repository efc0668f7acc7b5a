"""The loss of a model on a batch and the gradient of every trained parameter, and comparing two such results."""

from typing import Any, NamedTuple

import torch
from fakes import some_examples
from torch import Tensor

from understudy.batch import Batch, Reduction
from understudy.divergences import Divergence
from understudy.models.forward import score
from understudy.scores import Scores

BATCH = Batch.from_examples(some_examples(), pad=0)


class Result(NamedTuple):
    """What a training step computes on a batch."""

    loss: Tensor
    values: Tensor  # (N,)
    gradients: dict[str, Tensor | None]  # of the trained parameters, by name


def loss_and_gradients(
    student: Any,
    teacher: Scores,
    divergence: Divergence,
    batch: Batch = BATCH,
    reduction: Reduction | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> Result:
    """The divergence's loss, without a `reduction` a sum with weights of either sign.

    `options` are those of `score`.
    """
    rows = []

    def loss(scores: Scores) -> Tensor:
        values = teacher.divergence_to(scores, divergence)
        rows.append(values.detach())
        if reduction is None:
            return (values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum()
        return (values * batch.weights(reduction)).sum() / batch.normalizer(reduction)

    student.zero_grad(set_to_none=True)
    value = score(student, batch, loss, weights=weights, **options)
    value.backward()
    named = options.get("unwrapped", student).named_parameters()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named if p.requires_grad}
    return Result(value.detach(), rows[0], gradients)


def assert_same(result: Result, expected: Result, rtol: float, atol: float) -> None:
    """Loss, values and gradients agree; `atol` of a gradient is relative to its largest element if that is above 1."""
    torch.testing.assert_close(result.loss, expected.loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(result.values, expected.values, rtol=rtol, atol=atol)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in result.gradients.items():
        reference = expected.gradients[name]
        assert (gradient is None) == (reference is None), name
        if gradient is not None and reference is not None:
            largest = max(1.0, reference.abs().max().item())
            torch.testing.assert_close(gradient, reference, rtol=rtol, atol=atol * largest, msg=name)
