"""The teacher in this process: frozen, without dropout, in its own dtype. For all teachers see contracts/."""

from dataclasses import replace

import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny
from torch import nn

from understudy.batch import Batch
from understudy.divergences import ForwardKL
from understudy.models.forward import score, score_no_grad
from understudy.teacher import Capability
from understudy.teachers import TEACHERS
from understudy.teachers.local import LocalTeacher

BATCH = Batch.from_examples(ragged_examples(6), 0)
KINDS = ["llama", "gpt2", "qwen3", "opt", "phi", "gemma2", "granite", "cohere", "cohere2", "llama+lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_its_scores_are_those_of_the_models_own_logits(kind):
    model = tiny(kind)
    log_probs = LocalTeacher(model).score(BATCH).log_probs
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).detach(), atol=2e-5, rtol=0)


def test_its_log_probabilities_do_not_depend_on_the_students_autocast():
    scores = LocalTeacher(tiny("phi")).score(BATCH)
    expected = scores.log_probs
    with torch.autocast("cpu", torch.bfloat16):
        fresh = LocalTeacher(tiny("phi")).score(BATCH)
        assert torch.equal(fresh.log_probs, expected)
        torch.testing.assert_close(fresh.chosen, expected.gather(-1, BATCH.tokens[:, None])[:, 0])


def test_a_live_model_provides_everything():
    assert LocalTeacher(tiny("llama")).provides == frozenset(Capability)
    assert TEACHERS.get("local") is LocalTeacher


def test_dropout_is_off_even_for_a_model_in_training():
    model = tiny("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    teacher = LocalTeacher(model)
    assert torch.equal(teacher.score(BATCH).log_probs, teacher.score(BATCH).log_probs)
    assert not model.training


def test_its_parameters_are_frozen_and_get_no_gradient():
    teacher = LocalTeacher(tiny("llama", seed=2))
    student = tiny("llama", seed=1)
    scores = teacher.score(BATCH)
    score(student, BATCH, lambda q: scores.divergence_to(q, ForwardKL()).sum()).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_reading_in_parts_gives_the_same_scores_in_the_same_order(monkeypatch):
    teacher, batch = LocalTeacher(tiny("llama").double()), Batch.from_examples(ragged_examples(9, seed=3), pad=0)
    expected = score_no_grad(teacher.model, batch)
    calls = []
    teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("understudy.models.forward._PART", 20)
    scores = teacher.score(batch)
    assert len(calls) > 2
    torch.testing.assert_close(scores.log_probs, expected.log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.chosen, expected.chosen, rtol=0, atol=1e-12)


def test_scores_hold_only_hidden_states_and_the_head():
    """N rows of width D, whatever the vocabulary; the vocabulary is projected where the loss is computed."""
    teacher = LocalTeacher(tiny("llama"))
    scores = teacher.score(BATCH)
    assert scores.distribution.hidden.shape == (len(BATCH.tokens), 16)
    assert scores.distribution.head.weight.data_ptr() == teacher.model.lm_head.weight.data_ptr()


def test_padding_of_the_vocabulary_takes_no_part_once_it_is_cut():
    wide = tiny("llama", vocabulary=64)
    log_probs = LocalTeacher(wide).score(BATCH).cut(VOCABULARY).log_probs
    logits = wide(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    torch.testing.assert_close(log_probs, logits[:, :VOCABULARY].log_softmax(-1).detach(), atol=1e-5, rtol=0)


def test_it_keeps_its_own_dtype():
    teacher = LocalTeacher(tiny("llama").to(torch.bfloat16))
    scores = teacher.score(BATCH)
    assert teacher.model.dtype == torch.bfloat16
    assert scores.log_probs.dtype == torch.float32
    torch.testing.assert_close(scores.log_probs, LocalTeacher(tiny("llama")).score(BATCH).log_probs, atol=0.15, rtol=0)


def test_it_scores_in_its_own_precision_under_the_students_autocast():
    teacher = LocalTeacher(tiny("llama"))
    plain = teacher.score(BATCH).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        scores = teacher.score(BATCH)
    torch.testing.assert_close(scores.log_probs, plain, atol=1e-5, rtol=0)


def test_it_loads_by_name_in_the_checkpoints_dtype(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert LocalTeacher(str(tmp_path)).model.dtype == torch.bfloat16
    exact = LocalTeacher(str(tmp_path), dtype="float32")
    assert exact.model.dtype == torch.float32
    torch.testing.assert_close(
        exact.score(BATCH).log_probs, LocalTeacher(tiny("llama")).score(BATCH).log_probs, atol=0.1, rtol=0
    )


class Squaring(nn.Module):
    """A model that transforms its logits in an unknown way."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("llama")
        self.config, self.device = self.inner.config, self.inner.device

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits - 0.3 * output.logits.square()
        return output


def test_a_model_with_an_unknown_transformation_of_its_logits_takes_the_plain_path():
    model = Squaring()
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    log_probs = LocalTeacher(model).score(BATCH).log_probs
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", [1, 10**6], ids=["in parts", "at once"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_reads_the_teachers_prompts(masked, part, monkeypatch):
    """The scores of N rows are those of the same responses after other prompts, in the order of the batch."""
    monkeypatch.setattr("understudy.models.forward._PART", part)
    teacher = LocalTeacher(tiny("llama").double())
    prompts = [[5, 6, 7, 8, 9, 10], None, [11], [4, 4], None, [12, 5, 6]]
    examples = [
        replace(
            e, teacher_prompt=prompt, trained=[place % 2 == 0 for place in range(len(e.response))] if masked else None
        )
        for e, prompt in zip(ragged_examples(6), prompts, strict=True)
    ]
    batch = Batch.from_examples(examples, pad=0)
    scores = teacher.score(batch)
    assert torch.equal(scores.tokens, batch.tokens)
    direct = [replace(e, prompt=e.teacher_prompt or e.prompt, teacher_prompt=None) for e in examples]
    expected = [score_no_grad(teacher.model, Batch.from_examples([e], pad=0)) for e in direct]
    close = {"rtol": 0, "atol": 1e-6}  # attention takes its softmax in float32
    torch.testing.assert_close(scores.log_probs, torch.cat([s.log_probs for s in expected]), **close)
    torch.testing.assert_close(scores.chosen, torch.cat([s.chosen for s in expected]), **close)


def test_further_inputs_are_read_in_parts_as_well(monkeypatch):
    """Each part of a batch comes with the inputs of its own sequences."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("llama").double()
            self.config, self.device = self.inner.config, self.inner.device

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask, shift=0.0, use_cache=None):
            shift = torch.as_tensor(shift, dtype=torch.float64).view(-1, 1, 1)
            embeddings = self.inner.get_input_embeddings()(input_ids) + shift
            return self.inner(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=use_cache)

    teacher = LocalTeacher(Shifted())
    examples = [replace(e, inputs={"shift": [float(e.row)]}) for e in ragged_examples(6)]
    batch = Batch.from_examples(examples, pad=0)
    expected = score_no_grad(teacher.model, batch).log_probs
    monkeypatch.setattr("understudy.models.forward._PART", 1)
    torch.testing.assert_close(teacher.score(batch).log_probs, expected, rtol=0, atol=1e-6)
