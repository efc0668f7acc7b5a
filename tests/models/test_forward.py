"""Scoring a batch: the fused loss equals the loss from the model's own logits, in value and every gradient."""

import copy
from dataclasses import replace

import pytest
import torch
from fakes import KINDS, some_examples, tiny
from gradients import BATCH, assert_same, loss_and_gradients
from operations import LargestTensor
from torch import Tensor, nn

from understudy.batch import Batch, Example, micro_batches
from understudy.divergences import ForwardKL, JensenShannon, ReverseKL
from understudy.fused_linear import loss as fused_loss
from understudy.fused_linear.merged import TopK
from understudy.models import logits
from understudy.models.forward import score, score_no_grad
from understudy.scores import Scores

f64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr("understudy.fused_linear.loss.rows_per_tile", lambda vocabulary, device: 4)


# The two paths


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=["float32", "float64"])
def test_the_fused_loss_equals_the_plain_one_in_value_and_every_gradient(kind, tied, dtype):
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
        fused = loss_and_gradients(student, score_no_grad(teacher, BATCH), divergence, BATCH, reduction, weights)
        plain = loss_and_gradients(
            student, score_no_grad(teacher, BATCH, fused=False), divergence, BATCH, reduction, fused=False
        )
        assert_same(fused, plain, **options)
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in plain.gradients.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2", "granite", "cohere"])
def test_the_loss_equals_one_computed_from_the_models_own_logits(kind):
    student, teacher = tiny(kind).to(f64), tiny(kind, seed=1).to(f64)
    expected, count = 0.0, 0
    for example in BATCH.examples:  # one at a time, without padding
        ids = torch.tensor([example.prompt + example.response])
        q, p = (
            model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].softmax(-1) for model in (student, teacher)
        )
        expected += (p * (p / q).log()).sum().item()
        count += len(example.response)
    for fused in (True, False):
        value = loss_and_gradients(
            student, score_no_grad(teacher, BATCH), ForwardKL(), BATCH, "token", BATCH.weights("token"), fused=fused
        ).loss
        assert value.item() == pytest.approx(expected / count, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 1000])
def test_tile_size_changes_nothing(rows, monkeypatch):
    student, teacher = tiny("llama").to(f64), score_no_grad(tiny("gpt2", seed=1).to(f64), BATCH)
    expected = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH)
    monkeypatch.setattr("understudy.fused_linear.loss.rows_per_tile", lambda vocabulary, device: rows)
    assert_same(loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("real", [50, 53])
def test_with_a_vocabulary_size_padded_tokens_of_both_models_take_no_part(kind, real):
    student, teacher = tiny(kind).to(f64), tiny(kind, vocabulary=60, seed=1).to(f64)
    cut = score_no_grad(teacher, BATCH, vocabulary=real)
    fused = loss_and_gradients(student, cut, ReverseKL(), BATCH, vocabulary=real)
    plain = loss_and_gradients(student, cut, ReverseKL(), BATCH, vocabulary=real, fused=False)
    assert_same(fused, plain, rtol=1e-10, atol=1e-12)
    head = student.get_output_embeddings().weight.grad
    assert (head[:real] != 0).any(-1).all()
    assert (head[real:] == 0).all()
    assert cut.log_probs.shape[-1] == real
    torch.testing.assert_close(cut.log_probs.exp().sum(-1), torch.ones(len(BATCH.tokens), dtype=f64))


def test_vocabularies_padded_differently_are_compared_over_their_shared_tokens():
    student, teacher = tiny("llama").to(f64), tiny("llama", vocabulary=60, seed=1).to(f64)
    implicit = loss_and_gradients(student, score_no_grad(teacher, BATCH), ForwardKL(), BATCH)
    explicit = loss_and_gradients(
        student, score_no_grad(teacher, BATCH, vocabulary=53), ForwardKL(), BATCH, vocabulary=53
    )
    assert_same(implicit, explicit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_a_frozen_head_gets_no_gradient(fused, monkeypatch):
    student, teacher = tiny("llama+lora"), score_no_grad(tiny("llama", seed=1), BATCH)
    results = []
    run_tiles = fused_loss._run_tiles
    monkeypatch.setattr(fused_loss, "_run_tiles", lambda *a: results.append(run_tiles(*a)) or results[-1])
    loss_and_gradients(student, teacher, ForwardKL(), BATCH, "token", BATCH.weights("token"), fused=fused)
    assert student.get_output_embeddings().weight.grad is None
    assert all(weight is None for _, (_, weight, _) in results)
    assert len(results) == fused


def test_bfloat16_autocast_agrees_within_its_precision():
    student, teacher = tiny("llama"), score_no_grad(tiny("gpt2", width=24, seed=1), BATCH)
    exact = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", BATCH.weights("token"))
    with torch.autocast("cpu", torch.bfloat16):
        fused = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", BATCH.weights("token"))
        plain = loss_and_gradients(student, teacher, JensenShannon(0.5), BATCH, "token", fused=False)
    assert fused.values.dtype == torch.float32
    assert fused.gradients["lm_head.weight"].dtype == torch.float32
    for name, gradient in exact.gradients.items():
        error, plain_error = ((x.gradients[name] - gradient).norm() / gradient.norm() for x in (fused, plain))
        assert error < max(0.02, 1.5 * plain_error), name
    torch.testing.assert_close(fused.values, plain.values, rtol=0.02, atol=0.005)


def test_bfloat16_weights_agree_within_their_precision():
    student, teacher = tiny("qwen3").bfloat16(), score_no_grad(tiny("qwen3", seed=1).bfloat16(), BATCH)
    exact = loss_and_gradients(copy.deepcopy(student).double(), teacher, ForwardKL(), BATCH, "sequence", fused=False)
    fused = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "sequence", BATCH.weights("sequence"))
    plain = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "sequence", fused=False)
    for name, gradient in exact.gradients.items():
        error, plain_error = ((x.gradients[name].double() - gradient).norm() / gradient.norm() for x in (fused, plain))
        assert error < max(0.03, 2 * plain_error), name
    torch.testing.assert_close(fused.values, plain.values, rtol=0.01, atol=0.002)


def test_log_probabilities_of_the_chosen_tokens_are_the_same_on_both_paths():
    student = tiny("gemma2").to(f64)
    grads = []
    for fused in (True, False):
        student.zero_grad(set_to_none=True)
        score(student, BATCH, lambda s: (s.chosen * torch.arange(len(s.tokens))).sum(), fused=fused).backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-10, atol=1e-11)
    constants = score_no_grad(student, BATCH)
    torch.testing.assert_close(constants.chosen, constants.log_probs.gather(-1, BATCH.tokens[:, None])[:, 0])


def test_row_weights_that_follow_from_the_loss_give_the_gradients_of_the_plain_path():
    """Without `weights` for the Scores, as where a sequence's weight depends on the values of its rows."""
    student, teacher = tiny("llama").to(f64), score_no_grad(tiny("gpt2", seed=1).to(f64), BATCH)

    def loss(scores: Scores) -> Tensor:
        log_ratio = BATCH.per_sequence(teacher.chosen - scores.chosen)
        divergence = teacher.divergence_to(scores, ReverseKL())
        return torch.nn.functional.logsigmoid(log_ratio).sum() + (divergence * divergence.detach().sigmoid()).sum()

    gradients = []
    for fused in (True, False):
        student.zero_grad(set_to_none=True)
        score(student, BATCH, loss, fused=fused).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fused", [True, False])
def test_scores_without_gradients_are_constants_also_of_a_model_in_training(fused):
    scores = score_no_grad(tiny("phi"), BATCH, fused=fused)
    assert not scores.chosen.requires_grad
    assert not scores.log_probs.requires_grad


def test_a_top_k_teacher_gives_the_same_loss_on_both_paths():
    student = tiny("llama").to(f64)
    full = score_no_grad(tiny("llama", seed=1).to(f64), BATCH)
    top = Scores(BATCH.tokens, TopK(*full.log_probs.topk(7)))
    fused = loss_and_gradients(student, top, JensenShannon(0.5), BATCH)
    plain = loss_and_gradients(student, top, JensenShannon(0.5), BATCH, fused=False)
    assert_same(fused, plain, rtol=1e-9, atol=1e-11)
    for path in (True, False):
        with pytest.raises(ValueError, match="cannot be softened"):
            loss_and_gradients(student, top, ForwardKL(temperature=2.0), BATCH, fused=path)


def test_no_tensor_has_the_vocabulary_for_all_rows():
    student, teacher = tiny("llama", vocabulary=4000, width=8), tiny("llama", vocabulary=4000, width=8, seed=1)
    batch = Batch.from_examples([Example([5] * 8, [7] * 40) for _ in range(4)], pad=0)
    with LargestTensor() as largest:
        loss_and_gradients(student, score_no_grad(teacher, batch), ForwardKL(), batch, "token", batch.weights("token"))
    assert largest.size <= 4000 * 8  # the head itself, a tile of four rows being smaller
    assert largest.size < len(batch.tokens) * 4000 / 10


# Which positions count


def loss_of(student, teacher, examples, pad, reduction, **options):
    batch = Batch.from_examples(examples, pad)
    return loss_and_gradients(student, score_no_grad(teacher, batch), ForwardKL(), batch, reduction, **options).loss


class Perturbed(nn.Module):
    """A model whose logits are shifted where `mask` is true."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, **inputs):
        out = self.model(**inputs)
        shift = torch.linspace(0, 5, out.logits.shape[-1], dtype=out.logits.dtype)
        out.logits = torch.where(self.mask[..., None], out.logits + shift, out.logits)
        return out


@pytest.mark.parametrize(
    ("position", "counts"),
    [
        (lambda e, index: index == len(e.prompt) - 1, True),  # predicts the first response token
        (lambda e, index: index == len(e) - 2, True),  # predicts the end of sequence
        (lambda e, index: index < len(e.prompt) - 1, False),  # predicts prompt tokens
        (lambda e, index: index >= len(e) - 1, False),  # the end of sequence and the padding after it
    ],
    ids=["first response token", "end of sequence", "prompt", "after the end"],
)
def test_exactly_the_response_tokens_count(position, counts):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    width = BATCH.input_ids.shape[1]
    for row, example in enumerate(BATCH.examples):
        mask = torch.zeros_like(BATCH.predicts)
        mask[row] = torch.tensor([position(example, index) for index in range(width)])
        if not mask.any():
            continue
        teacher_scores = score_no_grad(teacher, BATCH)
        before = loss_and_gradients(student, teacher_scores, ForwardKL(), BATCH, "sum", fused=False)
        after = loss_and_gradients(Perturbed(student, mask), teacher_scores, ForwardKL(), BATCH, "sum", fused=False)
        assert (before.loss != after.loss) == counts


def every_second(examples: list[Example]) -> list[Example]:
    """Examples whose first, third … response tokens are trained on."""
    return [replace(e, trained=[place % 2 == 0 for place in range(len(e.response))]) for e in examples]


@pytest.mark.parametrize("fused", [True, False])
def test_a_masked_response_has_the_loss_and_gradients_of_zero_weights(fused):
    """The other response tokens are read as well: only their rows are missing."""
    student, teacher = tiny("llama").to(f64), tiny("gpt2", seed=1).to(f64)
    masked = Batch.from_examples(every_second(some_examples()), pad=0)
    trained = torch.tensor([place % 2 == 0 for e in BATCH.examples for place in range(len(e.response))])
    assert len(masked.tokens) == trained.sum() < len(BATCH.tokens)
    losses, gradients = [], []
    for batch, weights in ((masked, torch.ones(len(masked.tokens))), (BATCH, trained.float())):
        teacher_scores = score_no_grad(teacher, batch)

        def loss(scores: Scores, teacher_scores=teacher_scores, weights=weights) -> Tensor:
            values = teacher_scores.divergence_to(scores, JensenShannon(0.3)) - scores.chosen
            return (values * weights).sum()

        student.zero_grad(set_to_none=True)
        losses.append(score(student, batch, loss, weights=weights, fused=fused))
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
def test_neither_the_padding_id_nor_its_amount_changes_the_loss(fused, reduction):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    examples = some_examples()
    losses = [loss_of(student, teacher, examples, pad, reduction, fused=fused) for pad in (0, 2, 17)]
    assert losses[0] == losses[1] == losses[2]
    single = [loss_of(student, teacher, [e], 0, reduction, fused=fused) for e in examples]
    share = [len(e.response) / 14 if reduction == "token" else 1 / 3 for e in examples]
    assert sum(len(e.response) for e in examples) == 14
    combined = sum(value * part for value, part in zip(single, share, strict=True))
    torch.testing.assert_close(combined, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_accumulated_over_micro_batches_equal_those_of_the_batch(reduction, parts):
    student, teacher = tiny("llama").to(f64), tiny("llama", seed=1).to(f64)
    expected = loss_and_gradients(student, score_no_grad(teacher, BATCH), ForwardKL(), BATCH, reduction)
    batches = [Batch.from_examples(part, pad=0) for part in micro_batches(BATCH.examples, parts)]
    normalizer = sum(batch.normalizer(reduction) for batch in batches)
    student.zero_grad()
    for batch in batches:
        p, weights = score_no_grad(teacher, batch), batch.weights(reduction)

        def loss(q: Scores, p=p, weights=weights) -> Tensor:
            return (p.divergence_to(q, ForwardKL()) * weights).sum() / normalizer

        score(student, batch, loss, weights=weights).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[name], rtol=1e-6, atol=1e-8)


# Replacing the head's forward


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
    assert not logits._changed_configs


def test_a_forward_that_was_set_on_the_head_before_is_restored():
    model = tiny("llama")
    layer = model.get_output_embeddings()
    forward = layer.forward
    layer.forward = forward
    score(model, BATCH, lambda s: s.chosen.sum())
    assert vars(layer)["forward"] is forward


def test_hooks_around_the_head_still_run():
    model, calls = tiny("llama"), []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append("before"))
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("after"))
    score(model, BATCH, lambda s: calls.append("loss") or s.chosen.sum())
    assert calls == ["before", "loss", "after"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_teacher_that_shares_the_configuration_is_refused_inside_the_students_forward(fused):
    student = tiny("granite")
    teacher = type(student)(student.config)
    with pytest.raises(RuntimeError, match="score the teacher before the student"):
        score(student, BATCH, lambda s: score_no_grad(teacher, BATCH, fused=fused).divergence_to(s, ForwardKL()).sum())
    assert student.config.logits_scaling == 2.5
    independent = type(student)(copy.deepcopy(student.config)).eval()
    inside = score(
        student, BATCH, lambda s: score_no_grad(independent, BATCH, fused=fused).divergence_to(s, ForwardKL()).sum()
    )
    before = score_no_grad(independent, BATCH)
    torch.testing.assert_close(inside, score(student, BATCH, lambda s: before.divergence_to(s, ForwardKL()).sum()))


def test_a_model_without_its_adapters_can_be_the_teacher_of_itself():
    student = tiny("llama+lora")
    with student.disable_adapter():
        outside = score_no_grad(student, BATCH)

    def loss(scores: Scores) -> Tensor:
        with student.disable_adapter():
            inside = score_no_grad(student, BATCH)
        torch.testing.assert_close(inside.log_probs, outside.log_probs)
        return inside.divergence_to(scores, ForwardKL()).sum()

    assert score(student, BATCH, loss) > 1e-3


# Wrapped models


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama+lora"])
def test_a_model_in_distributed_data_parallel_has_the_same_gradients(kind, one_process):
    student, teacher = tiny(kind), score_no_grad(tiny("llama", seed=1), BATCH)
    expected = loss_and_gradients(student, teacher, ForwardKL(), BATCH, "token", BATCH.weights("token"))
    wrapped = nn.parallel.DistributedDataParallel(student)
    distributed = loss_and_gradients(
        wrapped, teacher, ForwardKL(), BATCH, "token", BATCH.weights("token"), unwrapped=student
    )
    assert_same(distributed, expected, rtol=1e-6, atol=1e-7)
