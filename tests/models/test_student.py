"""The student of a recipe: a model by name, a fresh one, or one with some of the teacher's layers."""

import copy

import pytest
import torch
from folders import VOCABULARY, characters, described, gpt2, llama, write
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from understudy.generation.stop_tokens import stop_ids
from understudy.models.student import load_student, student_config
from understudy.recipe import parse

IDS = torch.tensor([[5, 9, 12, 7, 30, 4]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    llama(home / "teacher")
    llama(home / "other", seed=1)
    gpt2(home / "gpt2")
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    configs = {
        "qwen3": Qwen3Config(**shape, hidden_size=32, intermediate_size=64, head_dim=16),
        "qwen2": Qwen2Config(**shape, hidden_size=32, intermediate_size=64, **sliding, use_sliding_window=True),
        "gemma2": Gemma2Config(**shape, hidden_size=32, intermediate_size=64, head_dim=8),
    }
    for name, config in configs.items():
        config.save_pretrained(home / name)
        characters().save_pretrained(home / name)
    return home


def student(home, block, teacher="teacher", seed=0):
    recipe = parse(described(home, student=block))
    name = None if teacher is None else str(home / teacher)
    config = student_config(recipe, name)
    set_seed(seed)
    return load_student(recipe, config, name).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same_weights(model, expected):
    weights = expected.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_model_by_folder_is_that_model(home):
    loaded = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    assert torch.equal(logits(student(home, {"model": str(home / "teacher")})), logits(loaded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("origin", ["model", "fresh", "layers"])
def test_a_student_has_the_dtype_of_the_recipe(home, dtype, origin):
    block = {"model": {"model": str(home / "teacher")}, "fresh": {"fresh": {}}, "layers": {"layers": [1]}}[origin]
    assert student(home, {**block, "dtype": dtype}).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("origin", [{"fresh": {}}, {"layers": [0]}])
def test_dtype_auto_is_the_teachers_dtype_for_a_student_that_comes_from_it(home, origin):
    assert student(home, {**origin, "dtype": "auto"}).dtype == torch.float32


def test_a_fresh_student_is_the_same_for_the_same_seed_whatever_the_teachers_weights(home):
    block = {"fresh": {"hidden_size": 8}}
    expected = student(home, block)
    assert same_weights(expected, student(home, block))
    assert same_weights(expected, student(home, block, teacher="other"))
    assert not same_weights(expected, student(home, block, seed=1))


def test_fields_of_a_fresh_student_may_have_either_of_their_names(home):
    for fields in ({"n_layer": 1, "n_embd": 8}, {"num_hidden_layers": 1, "hidden_size": 8}):
        model = student(home, {"fresh": fields}, teacher="gpt2")
        assert isinstance(model.config, GPT2Config)
        assert (model.config.n_layer, model.config.n_embd, len(model.transformer.h)) == (1, 8, 1)
        assert logits(model).shape == (1, 6, VOCABULARY)


@pytest.mark.parametrize(
    ("teacher", "fields", "expected"),
    [
        ("qwen3", {"num_hidden_layers": 2, "hidden_size": 16}, {"head_dim": 16, "num_key_value_heads": 2}),
        ("qwen3", {"num_attention_heads": 3}, {"num_key_value_heads": 3}),
        (
            "qwen2",
            {"num_hidden_layers": 3},
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        ("qwen2", {"num_hidden_layers": 6}, {"layer_types": ["sliding_attention", "full_attention"] * 3}),
        ("gemma2", {"hidden_size": 64}, {"head_dim": 16}),
        ("teacher", {"hidden_size": 8}, {"head_dim": 4, "num_key_value_heads": 2}),
        ("teacher", {"num_attention_heads": 4}, {"head_dim": 4, "num_key_value_heads": 4}),
        ("teacher", {"num_attention_heads": 1}, {"head_dim": 16, "num_key_value_heads": 1}),
        ("teacher", {"head_dim": 6, "num_key_value_heads": 1}, {"head_dim": 6, "num_key_value_heads": 1}),
    ],
)
def test_fields_that_follow_from_a_changed_one_are_changed_too(home, teacher, fields, expected):
    model = student(home, {"fresh": fields}, teacher=teacher)
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert torch.isfinite(logits(model)).all()


def test_a_fresh_student_needs_no_teacher_if_it_names_its_type(home):
    fields = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "intermediate_size": 16}
    model = student(home, {"fresh": fields, "tokenizer": str(home / "teacher")}, teacher=None)
    assert isinstance(model.config, LlamaConfig)
    assert same_weights(model, student(home, {"fresh": fields, "tokenizer": str(home / "teacher")}, teacher="gpt2"))


def test_a_fresh_student_is_not_quantized_as_its_teacher_is(home, tmp_path):
    config = AutoConfig.from_pretrained(home / "teacher")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    assert not hasattr(student(tmp_path, {"fresh": {}}, teacher=".").config, "quantization_config")


@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_a_student_of_all_layers_is_the_teacher(home, teacher):
    full = AutoModelForCausalLM.from_pretrained(home / teacher).eval()
    assert torch.equal(logits(student(home, {"layers": [0, 1, 2]}, teacher=teacher)), logits(full))


@pytest.mark.parametrize("layers", [[0, 2], [1], [2, 0], [1, 1]])
@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_a_student_of_some_layers_has_them_in_the_order_of_the_recipe(home, teacher, layers):
    full = AutoModelForCausalLM.from_pretrained(home / teacher).eval()
    body = full.transformer if teacher == "gpt2" else full.model
    name = "h" if teacher == "gpt2" else "layers"
    stack = [copy.deepcopy(getattr(body, name)[layer]) for layer in layers]
    for index, layer in enumerate(stack):
        (layer.attn if teacher == "gpt2" else layer.self_attn).layer_idx = index
    setattr(body, name, torch.nn.ModuleList(stack))
    full.config.num_hidden_layers = len(layers)
    cut = student(home, {"layers": layers}, teacher=teacher)
    assert cut.config.num_hidden_layers == len(layers)
    assert torch.equal(logits(cut), logits(full))


def test_a_student_of_some_layers_has_the_teachers_stop_tokens(home, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(home / "teacher")
    full.generation_config.eos_token_id = [2, 7]
    full.save_pretrained(tmp_path / "chat")
    cut = student(tmp_path, {"layers": [0]}, teacher="chat")
    assert cut.generation_config.eos_token_id == [2, 7]
    assert stop_ids(characters(), cut) == [2, 7]


def test_a_recipe_may_change_how_a_student_is_loaded(home, tmp_path):
    recipe = described(home, student={"model": str(home / "teacher"), "options": {"attn_implementation": "eager"}})
    write(tmp_path / "r.yaml", recipe)
    assert student(home, recipe["student"]).config._attn_implementation == "eager"
