"""The loss of a model on a batch and the gradient of every trained parameter, and comparing two such results."""

import torch
from fakes import some_examples
from torch import Tensor

from understudy.batch import Batch
from understudy.models.forward import score
from understudy.scores import Scores

BATCH = Batch.from_examples(some_examples(), pad=0)


def loss_and_gradients(student, teacher, divergence, batch=BATCH, reduction=None, weights=None, **options):
    """The loss, every row's value, and the gradient of every trained parameter."""
    rows = []

    def loss(mine: Scores) -> Tensor:
        values = teacher.divergence_to(mine, divergence)
        rows.append(values.detach())
        if reduction is None:
            return (values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum()
        return (values * batch.weights(reduction)).sum() / batch.normalizer(reduction)

    student.zero_grad(set_to_none=True)
    value = score(student, batch, loss, weights=weights, **options)
    value.backward()
    bare = options.get("unwrapped", student)
    return value.detach(), rows[0], {name: p.grad for name, p in bare.named_parameters() if p.requires_grad}


def assert_same(one, other, rtol, atol):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)
    assert one[2].keys() == other[2].keys()
    for name in one[2]:
        grad, wanted = one[2][name], other[2][name]
        assert (grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(
                grad, wanted, rtol=rtol, atol=atol * max(1.0, wanted.abs().max().item()), msg=name
            )
