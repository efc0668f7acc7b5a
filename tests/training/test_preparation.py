"""Checks before training: what would train nothing, or follow the student, or read other tokens, is refused."""

import copy
from typing import Any

import pytest
from fakes import ragged_examples, tiny, words
from folders import characters, llama
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from understudy.methods.kd import KD
from understudy.recipe import RecipeError
from understudy.teachers.local import LocalTeacher
from understudy.training.preparation import check_trainable
from understudy.training.trainer import StudentTrainer


def with_adapters(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_adapters_on_the_teachers_own_object_are_refused_because_the_teacher_would_follow():
    base = tiny("llama")
    teacher = LocalTeacher(base)
    with pytest.raises(ValueError, match="the teacher has trainable parameters of the student"):
        check_trainable(with_adapters(base), teacher)
    base = tiny("llama")
    student = with_adapters(base)
    student.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="all parameters of the student are frozen"):
        check_trainable(student, LocalTeacher(base))


def test_adapters_on_a_copy_of_the_teacher_are_trained():
    base = tiny("llama")
    check_trainable(with_adapters(copy.deepcopy(base)), LocalTeacher(base))


def test_a_teacher_by_name_has_the_students_tokens_or_is_refused(tmp_path):
    llama(tmp_path / "teacher", tokenizer=words())
    options = {"args": TrainingArguments(str(tmp_path), use_cpu=True), "train_dataset": ragged_examples(4)}
    teacher = LocalTeacher(str(tmp_path / "teacher"))
    assert StudentTrainer(tiny("llama"), teacher, KD(), processing_class=words(), **options)
    with pytest.raises(RecipeError, match="the tokenizers of student and teacher differ in"):
        StudentTrainer(tiny("llama"), teacher, KD(), processing_class=characters(), **options)
