"""The parity check: models that can be fused, and models that transform their logits in unknown ways."""

import logging
import math

import pytest
import torch
from fakes import KINDS, tiny
from gradients import BATCH
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaForCausalLM

from understudy.fused_linear.distributions import Dense
from understudy.models import parity
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


class Checked(GraniteConfig):
    """A configuration whose settings are checked when they are set, as Gemma 3n's soft-cap is."""

    def __setattr__(self, name, value):
        if name == "logits_scaling" and value == 1.0:
            raise ValueError("logits_scaling must be 2.5")
        super().__setattr__(name, value)


class Computed(GraniteConfig):
    """A configuration whose scale is computed, as MiniCPM3's is."""

    @property
    def logits_scaling(self):
        return 2.5

    @logits_scaling.setter
    def logits_scaling(self, value):
        if value != 2.5:
            raise AttributeError("property 'logits_scaling' has no setter")


def granite(kind):
    config = {name: value for name, value in tiny("granite").config.to_dict().items() if name != "model_type"}
    torch.manual_seed(0)
    return GraniteForCausalLM(kind(**config)).eval()


def test_a_setting_that_is_checked_when_it_is_set_is_switched_off_and_on_again():
    model = granite(Checked)
    before = model(BATCH.input_ids).logits
    assert logit_difference(model) < 1e-6
    assert torch.equal(model(BATCH.input_ids).logits, before)


def test_a_setting_that_cannot_be_switched_off_means_the_plain_path_which_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(parity, "_logged", set())
    model = granite(Computed)
    with caplog.at_level(logging.WARNING, "understudy.models.parity"):
        assert [can_fuse(model) for _ in range(3)] == [False] * 3
    assert caplog.text.count("GraniteForCausalLM computes the logits of all positions at once") == 1
    assert "transforms its logits in a way that is not known here" in caplog.text
    scores = score_no_grad(model, BATCH, fused=can_fuse(model))
    own = model(BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts].log_softmax(-1)
    torch.testing.assert_close(scores.log_probs, own.detach())


def test_a_forward_that_fails_without_logits_means_the_plain_path(caplog, monkeypatch):
    class Shaped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[:, -1, 0]
            return out

    monkeypatch.setattr(parity, "_logged", set())
    with caplog.at_level(logging.WARNING, "understudy.models.parity"):
        assert not can_fuse(Shaped(tiny("llama").config))
    assert "the model's forward fails with the loss in place of logits: too many indices" in caplog.text


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
