"""Students are what a recipe says: loaded, made afresh, cut from the teacher, with adapters."""

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
from understudy.models.load import check_tokenizers, check_vocabulary, load_config, load_model
from understudy.models.student import load_student, student_config
from understudy.recipe import RecipeError, parse

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


def same(one, other):
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def test_a_model_by_folder_is_that_model(home):
    loaded = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    assert torch.equal(logits(student(home, {"model": str(home / "teacher")})), logits(loaded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("origin", ["model", "fresh", "layers"])
def test_a_student_has_the_dtype_that_is_asked_for(home, dtype, origin):
    block = {"model": {"model": str(home / "teacher")}, "fresh": {"fresh": {}}, "layers": {"layers": [1]}}[origin]
    assert student(home, {**block, "dtype": dtype}).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("origin", [{"fresh": {}}, {"layers": [0]}])
def test_a_student_made_from_a_teacher_can_keep_its_dtype(home, origin):
    assert student(home, {**origin, "dtype": "auto"}).dtype == torch.float32


def test_a_fresh_student_is_the_same_for_the_same_seed_whatever_the_teachers_weights(home):
    block = {"fresh": {"hidden_size": 8}}
    one = student(home, block)
    assert same(one, student(home, block))
    assert same(one, student(home, block, teacher="other"))
    assert not same(one, student(home, block, seed=1))


def test_fields_of_a_fresh_student_may_have_either_of_their_names(home):
    for fields in ({"n_layer": 1, "n_embd": 8}, {"num_hidden_layers": 1, "hidden_size": 8}):
        made = student(home, {"fresh": fields}, teacher="gpt2")
        assert isinstance(made.config, GPT2Config)
        assert (made.config.n_layer, made.config.n_embd, len(made.transformer.h)) == (1, 8, 1)
        assert logits(made).shape == (1, 6, VOCABULARY)


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
def test_what_follows_from_a_changed_field_follows(home, teacher, fields, expected):
    made = student(home, {"fresh": fields}, teacher=teacher)
    assert {name: getattr(made.config, name) for name in expected} == expected
    assert torch.isfinite(logits(made)).all()


def test_a_fresh_student_needs_no_teacher_if_it_names_its_type(home):
    fields = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "intermediate_size": 16}
    made = student(home, {"fresh": fields, "tokenizer": str(home / "teacher")}, teacher=None)
    assert isinstance(made.config, LlamaConfig)
    assert same(made, student(home, {"fresh": fields, "tokenizer": str(home / "teacher")}, teacher="gpt2"))


def test_a_fresh_student_is_not_quantized_as_its_teacher_is(home, tmp_path):
    config = AutoConfig.from_pretrained(home / "teacher")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    assert not hasattr(student(tmp_path, {"fresh": {}}, teacher=".").config, "quantization_config")


@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_a_student_cut_with_all_layers_is_the_teacher(home, teacher):
    whole = AutoModelForCausalLM.from_pretrained(home / teacher).eval()
    assert torch.equal(logits(student(home, {"layers": [0, 1, 2]}, teacher=teacher)), logits(whole))


@pytest.mark.parametrize("layers", [[0, 2], [1], [2, 0], [1, 1]])
@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_a_cut_student_has_the_layers_that_were_asked_for_in_their_order(home, teacher, layers):
    whole = AutoModelForCausalLM.from_pretrained(home / teacher).eval()
    body = whole.transformer if teacher == "gpt2" else whole.model
    name = "h" if teacher == "gpt2" else "layers"
    stack = [copy.deepcopy(getattr(body, name)[layer]) for layer in layers]
    for index, layer in enumerate(stack):
        (layer.attn if teacher == "gpt2" else layer.self_attn).layer_idx = index
    setattr(body, name, torch.nn.ModuleList(stack))
    whole.config.num_hidden_layers = len(layers)
    cut = student(home, {"layers": layers}, teacher=teacher)
    assert cut.config.num_hidden_layers == len(layers)
    assert torch.equal(logits(cut), logits(whole))


def test_a_cut_student_ends_its_answers_as_the_teacher_does(home, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(home / "teacher")
    whole.generation_config.eos_token_id = [2, 7]
    whole.save_pretrained(tmp_path / "chat")
    cut = student(tmp_path, {"layers": [0]}, teacher="chat")
    assert cut.generation_config.eos_token_id == [2, 7]
    assert stop_ids(characters(), cut) == [2, 7]


def test_adapters_alone_are_trained_and_change_nothing_at_first(home):
    block = {"model": str(home / "teacher"), "peft": {"r": 2, "target_modules": "all-linear"}}
    made = student(home, block)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        name for name, _ in made.named_parameters() if "lora_" in name
    }
    assert torch.equal(logits(made), logits(load_model(str(home / "teacher")).eval()))


def test_adapters_know_where_the_model_below_them_lies_wherever_they_are_loaded(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    made = student(home, {"model": "teacher", "peft": {"r": 2, "target_modules": ["q_proj"]}})
    made.save_pretrained(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model("adapters").eval()), logits(made))
    assert load_config("adapters").num_hidden_layers == 3


def test_a_vocabulary_may_be_padded_but_not_too_small():
    tokenizer = characters()
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=VOCABULARY), "the student has")
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=VOCABULARY + 64), "the student has")
    with pytest.raises(RecipeError, match=f"has {VOCABULARY} tokens and the student has embeddings for 9 only"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=9), "the student has")


def test_tokenizers_that_differ_are_refused_and_ends_that_differ_are_mentioned(caplog):
    check_tokenizers(characters(), characters())
    assert not caplog.records
    with pytest.raises(RecipeError, match=r"differ in 1 of \d+ and \d+ tokens \('!' is absent for the student and"):
        check_tokenizers(characters(), characters("0123456789+-*/=#\n .,?abcdefghijklmnopqrstuvwxyz!"))
    other = characters()
    other.eos_token = "<s>"
    check_tokenizers(characters(), other)
    assert "end their answers differently ('</s>' and '<s>')" in caplog.text


def test_tokenizers_with_the_same_tokens_that_cut_text_differently_are_refused():
    from tokenizers import normalizers

    other = characters()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RecipeError, match="the same tokens but cut text differently"):
        check_tokenizers(characters(), other)


def test_a_recipe_may_change_how_a_student_is_loaded(home, tmp_path):
    recipe = described(home, student={"model": str(home / "teacher"), "options": {"attn_implementation": "eager"}})
    write(tmp_path / "r.yaml", recipe)
    assert student(home, recipe["student"]).config._attn_implementation == "eager"
