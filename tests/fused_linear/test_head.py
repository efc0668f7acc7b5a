"""A head: scale and soft-cap of its logits, and fewer tokens of its vocabulary."""

import pytest
import torch
from projected import N, V, f64, generator, random_projected


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_grad_product_is_the_derivative_through_scale_and_softcap(scale, softcap):
    student = random_projected(scale=scale, softcap=softcap)
    product = (student.hidden @ student.head.weight.t() + student.head.bias).detach().requires_grad_()
    logits = product * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(student.head(student.hidden), logits)
    grad = torch.randn(N, V, generator=generator(), dtype=f64)
    torch.testing.assert_close(
        student.head.transform.grad_product(grad, logits), torch.autograd.grad(logits, product, grad)[0]
    )


def test_a_head_is_cut_to_the_first_tokens_and_unchanged_by_a_larger_vocabulary():
    head = random_projected().head
    assert head.cut(V) is head
    assert head.cut(10).bias.shape == (10,)
    assert torch.equal(head.cut(10).weight, head.weight[:10])
