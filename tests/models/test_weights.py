"""Loading weights: a checkpoint that lacks some is refused, with their names; names of folders."""

import logging

import pytest
import torch
from folders import VOCABULARY, characters, described, llama, sums
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from understudy.models.load import load_config, load_model, load_tokenizer, resolve
from understudy.recipe import RecipeError, parse
from understudy.reward import RewardModel
from understudy.run.arguments import training_arguments
from understudy.run.build import build
from understudy.teachers.local import LocalTeacher

IDS = torch.tensor([[5, 9, 12, 7, 30, 4]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def change(folder, name="model.safetensors", drop=None, **added):
    """Drop the weights whose names contain `drop` from a folder's file, and add others."""
    weights = load_file(folder / name)
    kept = {key: weight for key, weight in weights.items() if drop is None or drop not in key}
    save_file(
        {**kept, **{key.replace("__", "."): tensor for key, tensor in added.items()}}, folder / name, {"format": "pt"}
    )
    return folder


def test_a_model_without_one_of_its_layers_is_refused_with_the_names_of_its_weights(tmp_path):
    change(llama(tmp_path / "teacher"), drop="layers.1.")
    with pytest.raises(
        RecipeError, match=r"9 weights are missing \(model\.layers\.1\.input_layernorm\.weight, .*with all of"
    ):
        load_model(str(tmp_path / "teacher"))
    with pytest.raises(RecipeError, match="9 weights are missing"):
        _ = LocalTeacher(str(tmp_path / "teacher")).model


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_run_does_not_begin_with_an_incomplete_student_or_teacher(tmp_path, whose):
    llama(tmp_path / "teacher")
    llama(tmp_path / "other")
    change(tmp_path / "teacher" if whose == "teacher" else tmp_path / "other", drop="layers.1.")
    sums(tmp_path / "sums.jsonl")
    recipe = parse(described(tmp_path, student={"model": str(tmp_path / "other")}))
    with pytest.raises(RecipeError, match="9 weights are missing"):
        build(recipe, training_arguments(recipe))


def test_a_reward_model_without_a_trained_head_is_refused(tmp_path):
    llama(tmp_path / "reward", num_labels=1)
    with pytest.raises(RecipeError, match=r"1 weights are missing \(score\.weight\)"):
        _ = RewardModel(str(tmp_path / "reward")).model
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "whole")
    characters().save_pretrained(tmp_path / "whole")
    assert RewardModel(str(tmp_path / "whole")).model.num_labels == 1


def test_a_bias_that_the_configuration_denies_is_refused(tmp_path):
    change(llama(tmp_path), model__layers__0__self_attn__q_proj__bias=torch.ones(16))
    with pytest.raises(
        RecipeError, match=r"1 weights belong to no part of it \(model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        load_model(str(tmp_path))


def test_weights_of_a_further_head_are_only_named(tmp_path, caplog):
    change(llama(tmp_path), v_head__summary__weight=torch.ones(1, 16))
    with caplog.at_level(logging.WARNING):
        load_model(str(tmp_path))
    assert "weights that the model does not use: v_head.summary.weight" in caplog.text


def test_tied_weights_are_not_missing(tmp_path):
    llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(str(tmp_path))), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def adapters(home):
    """Adapters with random weights on a model, and their logits."""
    llama(home / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config)
    model.save_pretrained(home / "adapters")
    return logits(model)


def test_adapters_are_loaded_with_the_model_below_them_and_its_tokenizer(tmp_path):
    expected = adapters(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path / "adapters"))), expected)
    assert torch.equal(logits(LocalTeacher(str(tmp_path / "adapters")).model), expected)
    assert load_tokenizer(str(tmp_path / "adapters")).get_vocab() == characters().get_vocab()
    assert load_config(str(tmp_path / "adapters")).num_hidden_layers == 3


def test_adapters_that_lack_a_weight_or_whose_base_does_are_refused(tmp_path):
    adapters(tmp_path)
    change(tmp_path / "adapters", "adapter_model.safetensors", drop="layers.1.")
    with pytest.raises(
        RecipeError, match=r"the file of adapters is incomplete: .*layers\.1\.self_attn\.q_proj\.lora_A"
    ):
        load_model(str(tmp_path / "adapters"))
    adapters(tmp_path)
    change(tmp_path / "base", drop="layers.1.")
    with pytest.raises(RecipeError, match=r"9 weights are missing"):
        load_model(str(tmp_path / "adapters"))


def test_names_may_begin_with_the_home_directory_or_be_a_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    llama(tmp_path / "run" / "student")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert (
        resolve("~/run/student") == resolve("~/run") == resolve(str(tmp_path / "run")) == str(tmp_path / "run/student")
    )
    assert load_config("~/run").num_hidden_layers == 3
    assert len(load_tokenizer("~/run")) == VOCABULARY
    assert load_model("~/run").config.num_hidden_layers == 3
    assert resolve("some/name") == "some/name"


def test_the_folder_of_an_unfinished_run_is_no_model_and_its_checkpoints_are_named(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RecipeError, match="an unfinished run: finish the run, or name one of its checkpoints"):
        load_model(str(tmp_path))
