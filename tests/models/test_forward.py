"""Scores: the loss in the head's place equals the loss from a model's own logits, for every way of making logits."""

import copy
import itertools
import math
import os

import pytest
import torch
from fakes import KINDS, VOCABULARY, Tabular, ragged_examples, some_examples, tiny
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask
from transformers.models.auto import CONFIG_MAPPING

from understudy import scores
from understudy.batch import Batch, Example, micro_batches
from understudy.divergences import ForwardKL, JensenShannon, ReverseKL
from understudy.fused_linear import loss as projection
from understudy.fused_linear.distributions import Dense, Projected, TopK
from understudy.models.forward import score, score_no_grad
from understudy.models.inputs import PACKABLE, can_pack
from understudy.models.logits import is_linear_head
from understudy.models.parity import logit_difference
from understudy.scores import Scores, divergence_metrics

BATCH = Batch.from_examples(some_examples(), pad=0)
f64 = torch.float64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(projection, "rows_per_tile", lambda vocabulary: 4)
    monkeypatch.setattr(scores, "rows_per_tile", lambda vocabulary: 4)


def teacher_scores(model: nn.Module, batch: Batch = BATCH, **options) -> Scores:
    """Scores that outlive the model's forward, as a teacher makes them."""
    kept = []
    with torch.no_grad():
        score(model, batch, lambda s: kept.append(s) or torch.zeros(()), **options)
    return kept[0]


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
    bare = options.get("head_of", student)
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


# The two paths


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=["float32", "float64"])
def test_projected_loss_equals_the_plain_one_in_value_and_every_gradient(kind, tied, dtype):
    student = tiny(kind, tied=tied).to(dtype)
    other = list(KINDS)[(list(KINDS).index(kind) + 3) % len(KINDS)]
    teacher = tiny(other, vocabulary=60, width=24, seed=1).to(dtype)
    options = {"rtol": 1e-10, "atol": 1e-12} if dtype == f64 else {"rtol": 1e-4, "atol": 2e-6}
    for divergence, reduction in [
        (JensenShannon(0.3), "sequence"),
        (ForwardKL(temperature=2.0, rescale=True), "token"),
        (ReverseKL(), None),
    ]:
        weights = None if reduction is None else BATCH.weights(reduction)
        projected = loss_and_gradients(student, teacher_scores(teacher), divergence, BATCH, reduction, weights)
        plain = loss_and_gradients(
            student, teacher_scores(teacher, fused=False), divergence, BATCH, reduction, fused=False
        )
        assert_same(projected, plain, **options)
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in plain[2].values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2", "granite", "cohere"])
def test_loss_equals_one_written_from_the_models_own_logits(kind):
    student, teacher = tiny(kind).to(f64), tiny(kind, seed=1).to(f64)
    expected, count = 0.0, 0
    for example in BATCH.examples:  # one at a time, without padding
        ids = torch.tensor([example.prompt + example.response])
        q, p = (
            model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].softmax(-1) for model in (student, teacher)
        )
        expected += (p * (p / q).log()).sum().item()
        count += len(example.response)
    for project in (True, False):
        value = loss_and_gradients(
            student, teacher_scores(teacher), ForwardKL(), BATCH, "token", BATCH.weights("token"), fused=project
        )[0]
        assert value.item() == pytest.approx(expected / count, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 1000])
def test_chunk_size_changes_nothing(rows, monkeypatch):
    student, teacher = tiny("llama").to(f64), teacher_scores(tiny("gpt2", seed=1).to(f64))
    one = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH)
    monkeypatch.setattr(projection, "rows_per_tile", lambda vocabulary: rows)
    assert_same(loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH), one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("real", [50, 53])
def test_an_explicit_vocabulary_takes_padded_tokens_out_on_both_sides(kind, real):
    student, teacher = tiny(kind).to(f64), tiny(kind, vocabulary=60, seed=1).to(f64)
    cut = teacher_scores(teacher, vocabulary=real)
    one = loss_and_gradients(student, cut, ReverseKL(), BATCH, vocabulary=real)
    other = loss_and_gradients(student, cut, ReverseKL(), BATCH, vocabulary=real, fused=False)
    assert_same(one, other, rtol=1e-10, atol=1e-12)
    head = student.get_output_embeddings().weight.grad
    assert (head[:real] != 0).any(-1).all()
    assert (head[real:] == 0).all()
    assert cut.log_probs.shape[-1] == real
    torch.testing.assert_close(cut.log_probs.exp().sum(-1), torch.ones(len(BATCH.tokens), dtype=f64))


def test_vocabularies_padded_differently_are_compared_over_what_they_share():
    student, teacher = tiny("llama").to(f64), tiny("llama", vocabulary=60, seed=1).to(f64)
    kept = teacher_scores(teacher)
    implicit = loss_and_gradients(student, kept, ForwardKL(), BATCH)
    explicit = loss_and_gradients(student, teacher_scores(teacher, vocabulary=53), ForwardKL(), BATCH, vocabulary=53)
    assert_same(implicit, explicit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("project", [True, False])
def test_a_frozen_head_gets_no_gradient(project, monkeypatch):
    student, teacher = tiny("llama+lora"), teacher_scores(tiny("llama", seed=1))
    made = []
    walk = projection._walk
    monkeypatch.setattr(projection, "_walk", lambda *a: made.append(walk(*a)) or made[-1])
    loss_and_gradients(student, teacher, ForwardKL(), BATCH, "token", fused=project)
    assert student.get_output_embeddings().weight.grad is None
    assert all(weight is None for _, (_, weight, _) in made)
    assert len(made) == project


def test_bfloat16_autocast_agrees_within_its_precision():
    student, teacher = tiny("llama"), teacher_scores(tiny("gpt2", width=24, seed=1))
    exact = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", BATCH.weights("token"))
    with torch.autocast("cpu", torch.bfloat16):
        one = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", BATCH.weights("token"))
        other = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", fused=False)
    assert one[1].dtype == torch.float32
    assert one[2]["lm_head.weight"].dtype == torch.float32
    for name, wanted in exact[2].items():
        ours, plain = ((result[2][name] - wanted).norm() / wanted.norm() for result in (one, other))
        assert ours < max(0.02, 1.5 * plain), name
    torch.testing.assert_close(one[1], other[1], rtol=0.02, atol=0.005)


def test_bfloat16_weights_agree_within_their_precision():
    student, teacher = tiny("qwen3").bfloat16(), teacher_scores(tiny("qwen3", seed=1).bfloat16())
    exact = loss_and_gradients(copy.deepcopy(student).double(), teacher, ForwardKL(), BATCH, "sequence", fused=False)
    one = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "sequence", BATCH.weights("sequence"))
    one = (*one[:2], {name: grad.clone() for name, grad in one[2].items()})
    other = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "sequence", fused=False)
    for name, wanted in exact[2].items():
        ours, plain = ((result[2][name].double() - wanted).norm() / wanted.norm() for result in (one, other))
        assert ours < max(0.03, 2 * plain), name
    torch.testing.assert_close(one[1], other[1], rtol=0.01, atol=0.002)


def test_log_probabilities_of_the_written_tokens_equal_the_plain_ones():
    student = tiny("gemma2").to(f64)
    grads = []
    for project in (True, False):
        student.zero_grad(set_to_none=True)
        score(student, BATCH, lambda s: (s.chosen * torch.arange(len(s.tokens))).sum(), fused=project).backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-10, atol=1e-11)
    kept = teacher_scores(student)
    torch.testing.assert_close(kept.chosen, kept.log_probs.gather(-1, BATCH.tokens[:, None])[:, 0])
    with pytest.raises(ValueError, match="top tokens only"):
        _ = Scores(BATCH.tokens, TopK(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))).chosen


def test_a_top_k_teacher_gives_both_paths_the_same():
    student = tiny("llama").to(f64)
    full = teacher_scores(tiny("llama", seed=1).to(f64))
    top = Scores(BATCH.tokens, TopK(*full.log_probs.topk(7)))
    one = loss_and_gradients(student, top, JensenShannon(0.5), BATCH)
    other = loss_and_gradients(student, top, JensenShannon(0.5), BATCH, fused=False)
    assert_same(one, other, rtol=1e-9, atol=1e-11)
    for project in (True, False):
        with pytest.raises(ValueError, match="cannot be softened"):
            loss_and_gradients(student, top, ForwardKL(temperature=2.0), BATCH, fused=project)


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_the_vocabulary_never_meets_all_rows():
    student, teacher = tiny("llama", vocabulary=4000, width=8), tiny("llama", vocabulary=4000, width=8, seed=1)
    batch = Batch.from_examples([Example([5] * 8, [7] * 40) for _ in range(4)], pad=0)
    with Largest() as largest:
        loss_and_gradients(student, teacher_scores(teacher, batch), ForwardKL(), batch, "token", batch.weights("token"))
    assert largest.size <= 4000 * 8  # the head itself, a chunk of four rows being smaller
    assert largest.size < len(batch.tokens) * 4000 / 10


# Which positions count


def loss_with(
    model: nn.Module, teacher: nn.Module, examples: list[Example], pad: int = 0, reduction="sequence", **options
):
    batch = Batch.from_examples(examples, pad)
    return loss_and_gradients(model, teacher_scores(teacher, batch), ForwardKL(), batch, reduction, **options)[0]


class Perturbed(nn.Module):
    """A model whose logits are shifted at chosen positions."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, **inputs):
        out = self.model(**inputs)
        bump = torch.linspace(0, 5, out.logits.shape[-1], dtype=out.logits.dtype)
        out.logits = torch.where(self.mask[..., None], out.logits + bump, out.logits)
        return out


@pytest.mark.parametrize(
    ("where", "counts"),
    [
        (lambda e, at: at == len(e.prompt) - 1, True),  # predicts the first response token
        (lambda e, at: at == len(e) - 2, True),  # predicts the end of sequence
        (lambda e, at: at < len(e.prompt) - 1, False),  # predicts prompt tokens
        (lambda e, at: at >= len(e) - 1, False),  # the end of sequence and the padding after it
    ],
    ids=["first response token", "end of sequence", "prompt", "after the end"],
)
def test_exactly_the_response_tokens_count(where, counts):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    width = BATCH.input_ids.shape[1]
    for row, example in enumerate(BATCH.examples):
        mask = torch.zeros_like(BATCH.predicts)
        mask[row] = torch.tensor([where(example, at) for at in range(width)])
        if not mask.any():
            continue
        kept = teacher_scores(teacher)
        before = loss_and_gradients(student, kept, ForwardKL(), BATCH, "sum", fused=False)[0]
        after = loss_and_gradients(Perturbed(student, mask), kept, ForwardKL(), BATCH, "sum", fused=False)[0]
        assert (before != after) == counts


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
def test_padding_changes_nothing_in_content_or_amount(project, reduction):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    examples = some_examples()
    losses = [loss_with(student, teacher, examples, pad, reduction, fused=project) for pad in (0, 2, 17)]
    assert losses[0] == losses[1] == losses[2]
    alone = [loss_with(student, teacher, [e], 0, reduction, fused=project) for e in examples]
    share = [len(e.response) / 14 if reduction == "token" else 1 / 3 for e in examples]
    assert sum(len(e.response) for e in examples) == 14
    combined = sum(a * s for a, s in zip(alone, share, strict=True))
    torch.testing.assert_close(combined, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_accumulated_over_micro_batches_equal_those_of_the_whole(reduction, parts):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    _, _, whole = loss_and_gradients(student, teacher_scores(teacher), ForwardKL(), BATCH, reduction)
    whole = {name: grad.clone() for name, grad in whole.items()}
    batches = [Batch.from_examples(part, pad=0) for part in micro_batches(BATCH.examples, parts)]
    units = sum(batch.normalizer(reduction) for batch in batches)
    student.zero_grad()
    for batch in batches:
        kept, weights = teacher_scores(teacher, batch), batch.weights(reduction)
        loss = score(
            student,
            batch,
            lambda s, k=kept, w=weights: (k.divergence_to(s, ForwardKL()) * w).sum() / units,
            weights=weights,
        )
        loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-6, atol=1e-8)


# Padding left out

RAGGED = Batch.from_examples(
    ragged_examples(5), pad=ragged_examples(5)[0].response[0]
)  # padded with a token that is in use
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # attention that transformers writes out takes its softmax in float32
PACKS = [kind for kind in KINDS if kind != "opt"]  # whose masks do not look at position ids


def by_hand(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **options):
    """What a FlashAttention does with a packed row: a position id that does not follow the last begins a sequence."""
    assert attention_mask is None
    place = options["position_ids"][0]
    sequence = (place.diff(prepend=place[:1] - 1) != 1).cumsum(0)
    apart = place[:, None] - place
    sees = (sequence[:, None] == sequence) & (apart >= 0) & (apart < (sliding_window or math.inf))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_by_hand", by_hand)
AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)


def small(family: str) -> PreTrainedModel:
    """A model of two layers in float64, with windows of three tokens where the family has windows."""
    shape = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    shape |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    usual = CONFIG_MAPPING[family]()
    shape |= {"sliding_window": 3, "max_window_layers": 1, "attn_logit_softcapping": None}
    shape |= {"use_sliding_window": family != "qwen2_moe"}  # whose kernels are never told of the window
    config = CONFIG_MAPPING[family](**{name: value for name, value in shape.items() if hasattr(usual, name)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model.config._attn_implementation = "sdpa"  # without caps Gemma 2 can do it, too
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.3)
    return model.to(f64).eval()


def packed_and_padded(model, monkeypatch, force: bool, batch=RAGGED, **options):
    """Loss, values and gradients with padding and without, and the shape of what the model read without."""
    teacher = Scores(batch.tokens, Dense(torch.randn(len(batch.tokens), VOCABULARY, dtype=f64).log_softmax(-1)))
    bare = scores.without_adapters(model)
    attention, shapes, results = bare.config._attn_implementation, [], []
    handle = bare.get_input_embeddings().register_forward_hook(lambda *a: shapes.append(a[2].shape))
    for pack in (False, True):
        with monkeypatch.context() as patch:
            if force or not pack:
                patch.setattr(scores, "can_pack", lambda _, pack=pack: pack)
            bare.config._attn_implementation = "flash_by_hand" if pack and not force else attention
            value, rows, grads = loss_and_gradients(model, teacher, JensenShannon(0.3), batch, **options)
            results.append((value, rows, {name: g if g is None else g.clone() for name, g in grads.items()}))
    handle.remove()
    return results[1], results[0], shapes[-1]


@pytest.mark.parametrize("force", [True, False], ids=["by masks", "by position ids"])
@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_a_family_that_may_be_packed_gives_the_same_values_and_gradients(family, force, monkeypatch):
    packed, padded, read = packed_and_padded(small(family), monkeypatch, force)
    assert_same(packed, padded, **CLOSE)
    assert read[:2] == (1, sum(map(len, RAGGED.examples)))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", PACKS)
def test_padding_left_out_changes_nothing_on_either_path(kind, tied, project, monkeypatch):
    packed, padded, read = packed_and_padded(tiny(kind, tied=tied).to(f64), monkeypatch, True, fused=project)
    assert_same(packed, padded, **CLOSE)
    assert read[:2] == (1, sum(map(len, RAGGED.examples)))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("force", [True, False], ids=["by masks", "by position ids"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "llama+lora"])
def test_a_soft_prompt_stands_before_every_packed_sequence(kind, force, project, monkeypatch):
    model, gradients, shapes = tiny(kind).to(f64), [], []
    prefix = torch.randn(4, 16, dtype=f64).requires_grad_()
    prefix.register_hook(lambda gradient: gradients.append(gradient.clone()))
    model.register_forward_pre_hook(lambda *a: shapes.append(a[2]["inputs_embeds"].shape), with_kwargs=True)
    packed, padded, _ = packed_and_padded(model, monkeypatch, force, soft_prompt=prefix, fused=project)
    assert_same(packed, padded, **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    assert shapes[1][:2] == (1, sum(map(len, RAGGED.examples)) + 4 * 5)
    assert (gradients[0].abs() > 1e-6).all()


@pytest.mark.parametrize("attention", ["sdpa", "flash_by_hand"])
def test_packed_sequences_do_not_see_each_other_because_positions_begin_anew(attention, monkeypatch):
    monkeypatch.setattr(scores, "can_pack", lambda _: True)
    model = tiny("llama").to(f64)
    model.config._attn_implementation = attention
    first, *others = ragged_examples(5)
    changed = Example([5, *first.prompt], first.response)
    before, after = (Batch.from_examples([one, *others], pad=0) for one in (first, changed))
    ours = before.sequence_ids > 0
    one, other = score_no_grad(model, before).log_probs, score_no_grad(model, after).log_probs
    torch.testing.assert_close(one[ours], other[ours], rtol=1e-12, atol=1e-12)
    assert (one[~ours] - other[~ours]).abs().amax(-1).min() > 1e-3

    inputs, predicts = scores._inputs(model, before, None)
    apart = model(**inputs).logits[predicts].log_softmax(-1)
    torch.testing.assert_close(apart, one, rtol=1e-12, atol=1e-12)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    mixed = model(**inputs).logits[predicts].log_softmax(-1)
    torch.testing.assert_close(mixed[~ours], one[~ours], rtol=1e-12, atol=1e-12)
    assert (mixed[ours] - one[ours]).abs().amax(-1).min() > 1e-3


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
def test_padding_is_left_out_where_the_attention_skips_it(kind, attention, packs):
    model = tiny(kind)
    model.config._attn_implementation = attention
    assert can_pack(model) == packs


class Borrowed(PreTrainedModel):
    """Code from somewhere else that goes by the name of a known family."""

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
        lambda: Borrowed(tiny("llama").config),
        lambda: get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        lambda: get_peft_model(
            tiny("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
        ),
    ],
    ids=["masks without positions", "alibi", "states", "convolutions", "foreign code", "prefix tuning", "aLoRA"],
)
def test_a_model_that_would_mix_packed_sequences_is_padded(make):
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model)
    assert scores._inputs(model, BATCH, None)[0]["input_ids"].shape == BATCH.input_ids.shape


def test_a_model_without_a_configuration_is_padded():
    assert not can_pack(tabular(P1, P2))


@pytest.mark.skipif("TEST_COMPILED" not in os.environ, reason="takes a quarter of a minute: set TEST_COMPILED=1")
def test_flex_attention_reads_packed_sequences_as_sdpa_reads_padded_ones():
    torch.compiler.reset()  # one shape at a time: its second compilation, for any shape, fails on some processors
    model = tiny("llama")
    padded = score_no_grad(model, RAGGED).log_probs
    model.config._attn_implementation = "flex_attention"
    assert can_pack(model)
    torch.testing.assert_close(score_no_grad(model, RAGGED).log_probs, padded, rtol=1e-4, atol=1e-5)


# Standing in for the head


class Failure(Exception):
    pass


def fail(_: Scores) -> Tensor:
    raise Failure


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_unchanged_afterwards_even_after_an_exception(kind):
    model = tiny(kind)
    layer = model.get_output_embeddings()
    inputs = {"input_ids": BATCH.input_ids, "attention_mask": BATCH.attention_mask}
    before, config = model(**inputs).logits, copy.deepcopy(model.config.to_dict())
    score(model, BATCH, lambda s: s.chosen.sum())
    with pytest.raises(Failure):
        score(model, BATCH, fail)
    assert "forward" not in vars(layer)
    assert model.config.to_dict() == config
    assert torch.equal(model(**inputs).logits, before)
    assert not scores._altered


def test_a_forward_that_someone_else_put_on_the_head_is_put_back():
    model = tiny("llama")
    layer = model.get_output_embeddings()
    theirs = layer.forward
    layer.forward = theirs
    score(model, BATCH, lambda s: s.chosen.sum())
    assert vars(layer)["forward"] is theirs


def test_hooks_around_the_head_still_run():
    model, seen = tiny("llama"), []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: seen.append("before"))
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append("after"))
    score(model, BATCH, lambda s: seen.append("loss") or s.chosen.sum())
    assert seen == ["before", "loss", "after"]


@pytest.mark.parametrize("project", [True, False])
def test_a_teacher_run_inside_while_sharing_the_configuration_is_refused_not_mis_scored(project):
    student = tiny("granite")
    teacher = type(student)(student.config)
    with pytest.raises(RuntimeError, match="score the teacher before the student"):
        score(student, BATCH, lambda s: teacher_scores(teacher, fused=project).divergence_to(s, ForwardKL()).sum())
    assert student.config.logits_scaling == 2.5
    own = type(student)(copy.deepcopy(student.config)).eval()
    inside = score(student, BATCH, lambda s: teacher_scores(own, fused=project).divergence_to(s, ForwardKL()).sum())
    before = teacher_scores(own)
    torch.testing.assert_close(inside, score(student, BATCH, lambda s: before.divergence_to(s, ForwardKL()).sum()))


def test_the_same_model_may_be_its_own_teacher_with_its_adapters_off():
    student = tiny("llama+lora")
    with student.disable_adapter():
        kept = teacher_scores(student)

    def loss(mine: Scores) -> Tensor:
        with student.disable_adapter():
            inside = teacher_scores(student)
        torch.testing.assert_close(inside.log_probs, kept.log_probs)
        return inside.divergence_to(mine, ForwardKL()).sum()

    assert score(student, BATCH, loss) > 1e-3


# Parity


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_holds_for_every_known_model(kind, tied):
    model = tiny(kind, tied=tied)
    assert logit_difference(model) < 1e-6
    assert logit_difference(model.train()) < 1e-6
    assert model.training


def test_parity_holds_for_a_model_that_multiplies_where_granite_divides():
    config = tiny("granite").config.to_dict()
    config.pop("model_type")
    model = HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**config)).eval()
    assert model.config.logits_scaling == 2.5
    assert logit_difference(model) < 1e-6


class Squashed(LlamaForCausalLM):
    """Caps its logits in a way of its own, which is invisible while they are small."""

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
def test_parity_tells_an_unknown_transformation_of_the_logits(kind, size):
    model = kind(tiny("llama").config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    assert logit_difference(model) > 0.01


def test_a_head_that_is_no_plain_linear_layer_takes_the_plain_path():
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
    kinds = []
    score(model, BATCH, lambda s: kinds.append(type(s.source)) or s.chosen.sum())
    assert kinds == [Dense]


# What is shown to people


@pytest.mark.parametrize("top", [False, True])
def test_compare_gives_divergences_and_entropies(top):
    student, teacher = (teacher_scores(tiny("llama", seed=seed).to(f64)) for seed in (0, 1))
    p, q = teacher.log_probs.exp(), student.log_probs.exp()
    if top:
        values, support = teacher.log_probs.topk(6)
        teacher = Scores(BATCH.tokens, TopK(values, support))
        p, q = (torch.cat([x.gather(-1, support), 1 - x.gather(-1, support).sum(-1, keepdim=True)], -1) for x in (p, q))
    seen = divergence_metrics(teacher, student)
    torch.testing.assert_close(seen["forward_kl"], (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(seen["reverse_kl"], (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(seen["student_entropy"], -(q * q.log()).sum(-1))
    torch.testing.assert_close(seen["teacher_entropy"], -(p * p.log()).sum(-1))


def test_compare_takes_vocabularies_of_different_size():
    student, teacher = teacher_scores(tiny("llama")), teacher_scores(tiny("llama", vocabulary=60, seed=1))
    seen = divergence_metrics(teacher, student)
    expected = ForwardKL()(teacher.distribution.log_probs()[:, :VOCABULARY].log_softmax(-1), student.log_probs)
    torch.testing.assert_close(seen["forward_kl"], expected)
    assert isinstance(teacher.source, Projected)


# Wrapped models


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama+lora"])
def test_a_model_in_distributed_data_parallel_has_the_same_gradients(kind, one_process):
    student, teacher = tiny(kind), teacher_scores(tiny("llama", seed=1))
    alone = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "token", BATCH.weights("token"))
    alone = (*alone[:2], {name: grad.clone() for name, grad in alone[2].items()})
    wrapped = nn.parallel.DistributedDataParallel(student)
    together = loss_and_gradients(
        wrapped, teacher, ForwardKL(), BATCH, "token", BATCH.weights("token"), unwrapped=student
    )
    assert_same(together, alone, rtol=1e-6, atol=1e-7)


# A world small enough to be enumerated: two steps of three tokens, after one prompt token

PROMPT = 0
P1, Q1 = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]
P2 = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]
Q2 = [[0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.5, 0.25]]


def tabular(first: list[float], second: list[list[float]]) -> Tabular:
    table = {(PROMPT,): torch.tensor(first, dtype=f64).log()}
    for token in range(3):
        table[PROMPT, token] = torch.tensor(second[token], dtype=f64).log()
    return Tabular(table)


EVERY_RESPONSE = [Example([PROMPT], [a, b], author="student") for a, b in itertools.product(range(3), repeat=2)]
WORLD = Batch.from_examples(EVERY_RESPONSE, pad=0)
CHANCE_Q = torch.tensor([Q1[a] * Q2[a][b] for a, b in itertools.product(range(3), repeat=2)], dtype=f64)
CHANCE_P = torch.tensor([P1[a] * P2[a][b] for a, b in itertools.product(range(3), repeat=2)], dtype=f64)


def expected_loss(divergence, reduction: str, student: Tabular, teacher: Tabular) -> Tensor:
    """E over the student's responses of a response's loss; responses are data, the divergence is differentiated."""
    kept = teacher_scores(teacher, WORLD, fused=False)

    def per_response(mine: Scores) -> Tensor:
        return WORLD.per_sequence(WORLD.weights(reduction) * kept.divergence_to(mine, divergence))

    return (CHANCE_Q * score(student, WORLD, per_response, fused=False)).sum()


@pytest.mark.parametrize(("divergence", "mean"), [(ForwardKL(), 0.334096), (ReverseKL(), 0.312208)])
def test_on_policy_loss_enumerated_over_all_responses(divergence, mean):
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    assert expected_loss(divergence, "sequence", student, teacher).item() == pytest.approx(mean, abs=1e-6)
    assert expected_loss(divergence, "sum", student, teacher).item() == pytest.approx(2 * mean, abs=2e-6)


def test_summed_on_policy_reverse_kl_is_the_divergence_between_whole_sequences():
    whole = (CHANCE_Q * (CHANCE_Q / CHANCE_P).log()).sum()
    summed = expected_loss(ReverseKL(), "sum", tabular(Q1, Q2), tabular(P1, P2))
    assert whole.item() == pytest.approx(0.624417, abs=1e-6)
    torch.testing.assert_close(summed, whole)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("sequence", 0.5)])
def test_sampling_is_not_differentiated_so_the_first_step_has_the_gradient_of_its_own_divergence(reduction, share):
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    expected_loss(ReverseKL(), reduction, student, teacher).backward()
    first = student.logits.grad[student.rows[PROMPT,]] / share
    assert first.tolist() == pytest.approx([-0.292777, 0.072776, 0.220001], abs=1e-6)
    # the gradient of the sequences' divergence also counts how the first token changes what comes after
    logits = torch.tensor(Q1, dtype=f64).log().requires_grad_()
    chance = logits.softmax(-1)[:, None] * torch.tensor(Q2, dtype=f64)
    exact = torch.autograd.grad((chance.flatten() * (chance.flatten() / CHANCE_P).log()).sum(), logits)[0]
    assert exact.tolist() == pytest.approx([-0.319804, 0.110602, 0.209202], abs=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_policy_gradient_of_the_log_ratio_is_in_expectation_the_reverse_kl_gradient(centred):
    """With the advantage log p(v) − log q(v) of sampled tokens alone; a constant in it changes nothing."""
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    kept = teacher_scores(teacher, WORLD, fused=False)

    def surrogate(mine: Scores) -> Tensor:
        advantage = (kept.chosen - mine.chosen).detach() - (0 if centred else 1)
        return WORLD.per_sequence(-advantage * mine.chosen)

    (CHANCE_Q * score(student, WORLD, surrogate, fused=False)).sum().backward()
    estimated = student.logits.grad.clone()
    student.logits.grad = None
    expected_loss(ReverseKL(), "sum", student, teacher).backward()
    torch.testing.assert_close(estimated, student.logits.grad, rtol=1e-10, atol=1e-12)
    assert estimated[student.rows[PROMPT,]].tolist() == pytest.approx([-0.292777, 0.072776, 0.220001], abs=1e-6)


def test_policy_gradient_with_reward_to_go_is_in_expectation_the_gradient_of_the_sequences_divergence():
    student, teacher = tabular(Q1, Q2), tabular(P1, P2)
    kept = teacher_scores(teacher, WORLD, fused=False)

    def surrogate(mine: Scores) -> Tensor:
        reward = (kept.chosen - mine.chosen).detach().view(-1, 2)
        to_go = reward.flip(-1).cumsum(-1).flip(-1).flatten()
        return WORLD.per_sequence(-(to_go - 1) * mine.chosen)

    (CHANCE_Q * score(student, WORLD, surrogate, fused=False)).sum().backward()
    first = student.logits.grad[student.rows[PROMPT,]]
    assert first.tolist() == pytest.approx([-0.319804, 0.110602, 0.209202], abs=1e-6)
