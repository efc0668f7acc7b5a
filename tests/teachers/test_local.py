"""The teacher in this process: frozen, without dropout, its own master. What all teachers promise is in contracts/."""

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
def test_it_says_what_the_model_s_own_logits_say(kind):
    model = tiny(kind)
    said = LocalTeacher(model).score(BATCH).log_probs
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    torch.testing.assert_close(said, logits.log_softmax(-1).detach(), atol=2e-5, rtol=0)


def test_a_live_model_gives_everything():
    assert LocalTeacher(tiny("llama")).gives is Capability.MODEL
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
    said = teacher.score(BATCH)
    score(student, BATCH, lambda scores: said.divergence_to(scores, ForwardKL()).sum()).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_reading_in_pieces_says_the_same_in_the_same_order(monkeypatch):
    teacher, batch = LocalTeacher(tiny("llama").double()), Batch.from_examples(ragged_examples(9, seed=3), pad=0)
    whole = score_no_grad(teacher.model, batch)
    calls = []
    teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("understudy.teachers.local._PART", 20)
    pieces = teacher.score(batch)
    assert len(calls) > 2
    torch.testing.assert_close(pieces.log_probs, whole.log_probs, rtol=0, atol=1e-12)
    torch.testing.assert_close(pieces.chosen, whole.chosen, rtol=0, atol=1e-12)


def test_only_hidden_states_are_kept_of_a_forward():
    """N rows of width D, whatever the vocabulary; the vocabulary is projected where the loss is computed."""
    teacher = LocalTeacher(tiny("llama"))
    said = teacher.score(BATCH)
    assert said.distribution.hidden.shape == (len(BATCH.tokens), 16)
    assert said.distribution.head.weight.data_ptr() == teacher.model.lm_head.weight.data_ptr()


def test_a_padded_vocabulary_s_rest_takes_no_part():
    wide = tiny("llama", vocabulary=64)
    said = LocalTeacher(wide).score(BATCH).cut(VOCABULARY).log_probs
    logits = wide(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    torch.testing.assert_close(said, logits[:, :VOCABULARY].log_softmax(-1).detach(), atol=1e-5, rtol=0)


def test_it_keeps_its_own_dtype():
    teacher = LocalTeacher(tiny("llama").to(torch.bfloat16))
    said = teacher.score(BATCH)
    assert teacher.model.dtype == torch.bfloat16
    assert said.log_probs.dtype == torch.float32
    torch.testing.assert_close(said.log_probs, LocalTeacher(tiny("llama")).score(BATCH).log_probs, atol=0.15, rtol=0)


def test_it_scores_in_its_own_precision_under_the_student_s_autocast():
    teacher = LocalTeacher(tiny("llama"))
    plain = teacher.score(BATCH).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        cast = teacher.score(BATCH)
    torch.testing.assert_close(cast.log_probs, plain, atol=1e-5, rtol=0)


def test_it_loads_by_name_in_the_checkpoint_s_dtype(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert LocalTeacher(str(tmp_path)).model.dtype == torch.bfloat16
    exact = LocalTeacher(str(tmp_path), dtype="float32")
    assert exact.model.dtype == torch.float32
    torch.testing.assert_close(
        exact.score(BATCH).log_probs, LocalTeacher(tiny("llama")).score(BATCH).log_probs, atol=0.1, rtol=0
    )


class Peculiar(nn.Module):
    """A model that does something to its logits that nobody knows of."""

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


def test_a_model_that_changes_its_logits_in_its_own_way_takes_the_plain_path():
    model = Peculiar()
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[BATCH.predicts]
    said = LocalTeacher(model).score(BATCH).log_probs
    torch.testing.assert_close(said, logits.log_softmax(-1).detach(), atol=1e-5, rtol=0)
