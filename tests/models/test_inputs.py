"""Model inputs of a batch: padded, packed into one row, after a soft prompt, with further inputs."""

import os
from dataclasses import replace

import pytest
import torch
from fakes import KINDS, VOCABULARY, Tabular, ragged_examples, tiny
from gradients import BATCH, assert_same, loss_and_gradients
from packed_attention import ATTENTION
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Lfm2Config, MambaConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from understudy.batch import Batch, Example
from understudy.divergences import JensenShannon
from understudy.fused_linear.distributions import Dense
from understudy.models.adapters import without_adapters
from understudy.models.forward import score_no_grad
from understudy.models.inputs import PACKABLE, can_pack, further_inputs, model_inputs
from understudy.scores import Scores

f64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr("understudy.fused_linear.loss.rows_per_tile", lambda vocabulary, device: 4)


# Further inputs


class WithImage(nn.Module):
    """A model that adds a number per sequence to the embeddings of all its tokens, as an image would change them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama").to(f64)
        self.config = self.inner.config
        self.inputs: list[dict] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask, pixel_values, use_cache=None):
        self.inputs.append({"input_ids": input_ids, "pixel_values": pixel_values})
        embeddings = self.inner.get_input_embeddings()(input_ids) + pixel_values[:, None, None]
        return self.inner(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=use_cache)


def with_image(example: Example, value: float) -> Example:
    return replace(example, inputs={"pixel_values": torch.tensor([value], dtype=f64)})


def test_further_inputs_are_joined_along_their_first_dimension():
    """Which is not always one per example: some models take the patches of all images in one tensor."""
    patches = [torch.randn(2, 5), torch.randn(3, 5)]
    grids = [[[1, 2, 1]], [[1, 3, 1]]]
    examples = [Example([5], [6], inputs={"patches": p, "grid": g}) for p, g in zip(patches, grids, strict=True)]
    joined = further_inputs(examples, "cpu")
    assert list(joined) == ["grid", "patches"]
    assert torch.equal(joined["patches"], torch.cat(patches))
    assert joined["grid"].tolist() == [[1, 2, 1], [1, 3, 1]]
    assert further_inputs([Example([5], [6])], "cpu") == {}


def test_an_input_that_some_examples_lack_is_refused():
    examples = [with_image(Example([5], [6]), 1.0), Example([5], [6], row=3)]
    with pytest.raises(ValueError, match='row 3 has no input "pixel_values", which other examples of its batch'):
        further_inputs(examples, "cpu")


@pytest.mark.parametrize("fused", [True, False])
def test_further_inputs_reach_the_models_forward(fused):
    model = WithImage()
    examples = [with_image(e, value) for e, value in zip(RAGGED.examples, (0.0, 1.0, -1.0, 2.0, 0.5), strict=True)]
    log_probs = score_no_grad(model, Batch.from_examples(examples, pad=0), fused=fused).log_probs
    assert model.inputs[-1]["pixel_values"].tolist() == [0.0, 1.0, -1.0, 2.0, 0.5]
    single = [score_no_grad(model, Batch.from_examples([e], pad=0), fused=fused).log_probs for e in examples]
    torch.testing.assert_close(log_probs, torch.cat(single), **CLOSE)
    without = score_no_grad(model.inner, RAGGED, fused=fused).log_probs
    changed = (log_probs - without).abs().amax(-1) > 1e-3
    assert torch.equal(changed, RAGGED.sequence_ids != 0)


def test_examples_with_further_inputs_are_not_packed(monkeypatch):
    monkeypatch.setattr("understudy.models.inputs.can_pack", lambda _: True)
    model = WithImage()
    inputs, predicts = model_inputs(model, Batch.from_examples([with_image(e, 1.0) for e in BATCH.examples], pad=0))
    assert torch.equal(inputs["input_ids"], BATCH.input_ids)
    assert torch.equal(inputs["attention_mask"], BATCH.attention_mask)
    assert torch.equal(predicts, BATCH.predicts)
    assert model_inputs(model.inner, BATCH)[0]["input_ids"].shape[0] == 1


# Packing

RAGGED = Batch.from_examples(
    ragged_examples(5), pad=ragged_examples(5)[0].response[0]
)  # padded with a token that is in use
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # attention that transformers writes out takes its softmax in float32
PACKS = [kind for kind in KINDS if kind != "opt"]  # whose masks do not look at position ids


def two_layers(family: str) -> PreTrainedModel:
    """A model of two layers in float64, with windows of three tokens where the family has windows."""
    shape = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    shape |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    defaults = CONFIG_MAPPING[family]()
    shape |= {"sliding_window": 3, "max_window_layers": 1, "attn_logit_softcapping": None}
    shape |= {"use_sliding_window": family != "qwen2_moe"}  # whose kernels do not get the window
    config = CONFIG_MAPPING[family](**{name: value for name, value in shape.items() if hasattr(defaults, name)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.config._attn_implementation = "sdpa"  # without caps Gemma 2 can do it, too
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.3)
    return model.to(f64).eval()


def packed_and_padded(model, monkeypatch, force: bool, batch=RAGGED, **options):
    """Loss, values and gradients of packed and padded inputs, and the shape of the packed ones."""
    teacher = Scores(batch.tokens, Dense(torch.randn(len(batch.tokens), VOCABULARY, dtype=f64).log_softmax(-1)))
    inner = without_adapters(model)
    attention, shapes, results = inner.config._attn_implementation, [], []
    handle = inner.get_input_embeddings().register_forward_hook(lambda *a: shapes.append(a[2].shape))
    for pack in (False, True):
        with monkeypatch.context() as patch:
            if force or not pack:
                patch.setattr("understudy.models.inputs.can_pack", lambda _, pack=pack: pack)
            inner.config._attn_implementation = ATTENTION if pack and not force else attention
            results.append(loss_and_gradients(model, teacher, JensenShannon(0.3), batch, **options))
    handle.remove()
    return results[1], results[0], shapes[-1]


@pytest.mark.parametrize("force", [True, False], ids=["by masks", "by position ids"])
@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_a_family_that_may_be_packed_gives_the_same_values_and_gradients(family, force, monkeypatch):
    packed, padded, shape = packed_and_padded(two_layers(family), monkeypatch, force)
    assert_same(packed, padded, **CLOSE)
    assert shape[:2] == (1, sum(map(len, RAGGED.examples)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", PACKS)
def test_packing_changes_nothing_on_either_path(kind, tied, fused, monkeypatch):
    packed, padded, shape = packed_and_padded(tiny(kind, tied=tied).to(f64), monkeypatch, True, fused=fused)
    assert_same(packed, padded, **CLOSE)
    assert shape[:2] == (1, sum(map(len, RAGGED.examples)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("force", [True, False], ids=["by masks", "by position ids"])
def test_masked_responses_are_the_same_packed_and_padded(force, fused, monkeypatch):
    masked = [replace(e, trained=[place % 3 != 1 for place in range(len(e.response))]) for e in RAGGED.examples]
    batch = Batch.from_examples(masked, pad=0)
    assert len(batch.tokens) < len(RAGGED.tokens)
    packed, padded, shape = packed_and_padded(tiny("qwen3").to(f64), monkeypatch, force, batch, fused=fused)
    assert_same(packed, padded, **CLOSE)
    assert shape[:2] == (1, sum(map(len, masked)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("force", [True, False], ids=["by masks", "by position ids"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "llama+lora"])
def test_a_soft_prompt_stands_before_every_packed_sequence(kind, force, fused, monkeypatch):
    model, gradients, shapes = tiny(kind).to(f64), [], []
    prefix = torch.randn(4, 16, dtype=f64).requires_grad_()
    prefix.register_hook(lambda gradient: gradients.append(gradient.clone()))
    model.register_forward_pre_hook(lambda *a: shapes.append(a[2]["inputs_embeds"].shape), with_kwargs=True)
    packed, padded, _ = packed_and_padded(model, monkeypatch, force, soft_prompt=prefix, fused=fused)
    assert_same(packed, padded, **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    assert shapes[1][:2] == (1, sum(map(len, RAGGED.examples)) + 4 * 5)
    assert (gradients[0].abs() > 1e-6).all()


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_packed_sequences_do_not_see_each_other_because_positions_begin_anew(attention, monkeypatch):
    monkeypatch.setattr("understudy.models.inputs.can_pack", lambda _: True)
    model = tiny("llama").to(f64)
    model.config._attn_implementation = attention
    first, *rest = ragged_examples(5)
    changed = Example([5, *first.prompt], first.response)
    before, after = (Batch.from_examples([example, *rest], pad=0) for example in (first, changed))
    unchanged = before.sequence_ids > 0
    log_probs, log_probs_after = score_no_grad(model, before).log_probs, score_no_grad(model, after).log_probs
    torch.testing.assert_close(log_probs[unchanged], log_probs_after[unchanged], rtol=1e-12, atol=1e-12)
    assert (log_probs[~unchanged] - log_probs_after[~unchanged]).abs().amax(-1).min() > 1e-3

    inputs, predicts = model_inputs(model, before, None)
    separate = model(**inputs).logits[predicts].log_softmax(-1)
    torch.testing.assert_close(separate, log_probs, rtol=1e-12, atol=1e-12)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    mixed = model(**inputs).logits[predicts].log_softmax(-1)
    torch.testing.assert_close(mixed[~unchanged], log_probs[~unchanged], rtol=1e-12, atol=1e-12)
    assert (mixed[unchanged] - log_probs[unchanged]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("attention", "packs"),
    [
        ("flash_attention_2", True),
        ("flash_attention_3", True),
        ("flash_attention_4", True),
        ("kernels-community/flash-attn2", True),
        ("kernels-community/vllm-flash-attn3", True),
        ("flex_attention", True),
        ("sdpa", False),
        ("eager", False),
        (None, False),
        ("paged|flash_attention_2", False),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama+lora"])
def test_sequences_are_packed_where_the_attention_separates_them(kind, attention, packs):
    model = tiny(kind)
    model.config._attn_implementation = attention
    assert can_pack(model) == packs


class CustomCode(PreTrainedModel):
    """A model that is not transformers' own under the name of a packable family."""

    _supports_sdpa = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None): ...


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("opt"),
        lambda: AutoModelForCausalLM.from_config(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)),
        lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)),
        lambda: AutoModelForCausalLM.from_config(
            Lfm2Config(
                vocab_size=9,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
            )
        ),
        lambda: CustomCode(tiny("llama").config),
        lambda: get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        lambda: get_peft_model(
            tiny("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
        ),
    ],
    ids=["masks without positions", "alibi", "states", "convolutions", "custom code", "prefix tuning", "aLoRA"],
)
def test_a_model_that_would_mix_packed_sequences_is_padded(make):
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model)
    assert model_inputs(model, BATCH, None)[0]["input_ids"].shape == BATCH.input_ids.shape


def test_a_model_without_a_configuration_is_padded():
    assert not can_pack(Tabular({(0,): torch.zeros(3)}))


@pytest.mark.skipif("TEST_COMPILED" not in os.environ, reason="takes a quarter of a minute: set TEST_COMPILED=1")
def test_packed_flex_attention_equals_padded_sdpa():
    torch.compiler.reset()  # one shape at a time: its second compilation, for any shape, fails on some processors
    model = tiny("llama")
    padded = score_no_grad(model, RAGGED).log_probs
    model.config._attn_implementation = "flex_attention"
    assert can_pack(model)
    torch.testing.assert_close(score_no_grad(model, RAGGED).log_probs, padded, rtol=1e-4, atol=1e-5)
