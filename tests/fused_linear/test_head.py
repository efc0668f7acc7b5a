"""A head: scale and soft-cap of its logits, and fewer tokens of its vocabulary."""

import pytest
import torch
from projected import N, V, f64, generator, random_projected

from understudy.fused_linear.head import _softmax_of_a_row_at_a_time


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


@pytest.mark.parametrize("vocabulary", [3, 31, 1000])
def test_the_softmax_that_is_compiled_is_the_softmax(vocabulary):
    """Also of logits about 1000, and with impossible tokens, at the beginning of the vocabulary and elsewhere."""
    logits = 3 * torch.randn(5, vocabulary, generator=generator(), dtype=f64)
    logits[1] += 1000
    logits[2, :2] = logits[3, 2:] = -torch.inf
    for dtype, tolerance in ((f64, 1e-12), (torch.float32, 2e-6)):
        log_probs, probs = _softmax_of_a_row_at_a_time(logits.to(dtype))
        expected = logits.to(dtype).double().log_softmax(-1)
        torch.testing.assert_close(log_probs.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(probs.double(), expected.exp(), rtol=tolerance, atol=0)
