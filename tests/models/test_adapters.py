"""PEFT adapters of a student: what they train, and loading them with the model below them."""

import pytest
import torch
from folders import described, llama
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from understudy.models.adapters import without_adapters
from understudy.models.load import load_config, load_model
from understudy.models.student import load_student, student_config
from understudy.recipe import RecipeError, parse

IDS = torch.tensor([[5, 9, 12, 7, 30, 4]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    llama(home / "teacher")
    return home


def with_adapters(home, model, **fields):
    recipe = parse(described(home, student={"model": model, "peft": fields}))
    return load_student(recipe, student_config(recipe, None), None).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_only_adapters_are_trained_and_they_change_nothing_at_first(home):
    student = with_adapters(home, str(home / "teacher"), r=2, target_modules="all-linear")
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if "lora_" in name}
    assert trained
    assert torch.equal(logits(student), logits(load_model(str(home / "teacher")).eval()))


def test_saved_adapters_find_the_model_below_them_from_any_working_directory(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    student = with_adapters(home, "teacher", r=2, target_modules=["q_proj"])
    student.save_pretrained(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model("adapters").eval()), logits(student))
    assert load_config("adapters").num_hidden_layers == 3


def test_the_model_without_adapters_is_the_one_inside_them(home):
    plain = AutoModelForCausalLM.from_pretrained(home / "teacher")
    assert without_adapters(plain) is plain
    student = with_adapters(home, str(home / "teacher"), r=2, target_modules=["q_proj"])
    assert type(without_adapters(student)) is type(plain)


def test_an_unknown_adapter_setting_is_refused_with_the_one_that_is_meant(home):
    with pytest.raises(RecipeError, match='no field "target_module"; did you mean "target_modules'):
        with_adapters(home, str(home / "teacher"), target_module=["q_proj"])


def test_what_peft_adds_to_its_lists_does_not_change_the_recipe(home):
    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this version of PEFT does not have it")
    llama(home / "tied", tie_word_embeddings=True)
    peft = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    recipe = parse(described(home, student={"model": str(home / "tied"), "peft": peft}))
    before = recipe.resolved()
    load_student(recipe, student_config(recipe, None), None)
    assert recipe.resolved() == before, "a resumed run would be refused as one of another recipe"


def test_too_little_memory_to_try_out_adapters_is_a_warning_and_no_refusal(home, monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("understudy.models.adapters.check_adapters", fail)
    student = with_adapters(home, str(home / "teacher"), r=2, target_modules="all-linear")
    assert hasattr(student, "peft_config")
    assert "there is no memory to try out the adapters" in caplog.text
