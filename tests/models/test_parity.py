"""The parity check: models that can be fused, and models that transform their logits in unknown ways."""

import math

import pytest
import torch
from fakes import KINDS, tiny
from gradients import BATCH
from torch import Tensor, nn
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaForCausalLM

from understudy.fused_linear.distributions import Dense
from understudy.models.forward import score_no_grad
from understudy.models.logits import is_linear_head
from understudy.models.parity import can_fuse, logit_difference


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_fused(kind, tied):
    model = tiny(kind, tied=tied)
    assert logit_difference(model) < 1e-6
    assert logit_difference(model.train()) < 1e-6
    assert can_fuse(model)
    assert model.training


def test_logits_scaling_multiplies_in_hyperclovax_and_divides_in_granite():
    config = tiny("granite").config.to_dict()
    config.pop("model_type")
    model = HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**config)).eval()
    assert model.config.logits_scaling == 2.5
    assert logit_difference(model) < 1e-6


class Squashed(LlamaForCausalLM):
    """Caps its logits, which is invisible while they are small."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Shifted(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits - 1.0
        return out


@pytest.mark.parametrize("kind", [Squashed, Shifted])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_an_unknown_transformation_of_the_logits_is_detected(kind, size):
    model = kind(tiny("llama").config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    assert logit_difference(model) > 0.01
    assert not can_fuse(model)


def test_a_head_that_is_not_a_linear_layer_takes_the_plain_path():
    class Doubling(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * self.inner(hidden)

    model = tiny("llama")
    model.lm_head = Doubling(model.lm_head)
    assert not is_linear_head(model.get_output_embeddings())
    assert not is_linear_head(None)
    assert logit_difference(model) == math.inf
    assert isinstance(score_no_grad(model, BATCH).distribution, Dense)
