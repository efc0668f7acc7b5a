"""Adapters of every kind are saved (or merged) as the model that was trained, or refused before training."""

import logging
import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from folders import described, llama
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from understudy.models.adapters import merged
from understudy.models.load import load_model
from understudy.models.saved import (
    SavedModelDiffers,
    check_same,
    check_saved,
    name_magnitudes,
    probe_log_probs,
    samples,
)
from understudy.models.student import load_student, student_config
from understudy.recipe import RecipeError, parse

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings with dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved norms": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "ranks": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3}},
    "repeated layers": {"layer_replication": [[0, 2], [1, 3]]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
}
ABOUT_THE_HEAD = re.compile("^lora|head|embeddings|both|tied|tokens")
REFUSED = {
    *((kind, False) for kind in ("pissa", "pissa, fast", "olora")),  # adapters alone lack a change of the base
    *((kind, "tied", True) for kind in ("head", "embeddings", "embeddings with dora", "both")),
    ("repeated layers", True),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    llama(home / "tied", tie_word_embeddings=True)
    llama(home / "untied")
    return home


def student(home, **block):
    recipe = parse(described(home, student=block))
    return load_student(recipe, student_config(recipe, None), None)


def train(model):
    """Change every trainable weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def difference(model, expected):
    """The largest difference of probabilities."""
    return float((probe_log_probs(model).exp() - expected.exp()).abs().max())


@pytest.mark.parametrize("merge", [False, True], ids=["saved", "merged"])
@pytest.mark.parametrize(
    ("kind", "model"), [(k, m) for k in KINDS for m in ("tied", "untied") if m == "untied" or ABOUT_THE_HEAD.search(k)]
)
def test_adapters_are_loaded_as_the_model_that_was_trained_or_refused(home, tmp_path, kind, model, merge):
    block = {"model": str(home / model), "peft": {"r": 2, "target_modules": ["q_proj", "v_proj"], **KINDS[kind]}}
    if KINDS[kind].keys() - LoraConfig.__dataclass_fields__.keys():
        pytest.skip("this version of PEFT does not have it")
    trained, error = None, ""
    try:
        trained = train(student(home, **block, merge=merge))
    except RecipeError as refusal:
        error = str(refusal)
    if trained is None:
        assert {(kind, merge), (kind, model, merge)} & REFUSED
        assert ("cannot be merged" if merge else "add merge: true") in error
        return
    assert not {(kind, merge), (kind, model, merge)} & REFUSED
    expected = probe_log_probs(trained)
    assert difference(load_model(str(home / model)), expected) > 0.01
    if merge:
        trained = trained.merge_and_unload()
    trained.save_pretrained(tmp_path)
    name_magnitudes(tmp_path)
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path), expected) < 1e-5
    if not merge:
        base = AutoModelForCausalLM.from_pretrained(home / model)
        assert difference(PeftModel.from_pretrained(base, tmp_path), expected) < 1e-5


def test_merging_an_adapted_head_that_is_tied_to_the_embeddings_is_refused_before_training(home):
    block = {"model": str(home / "tied"), "peft": {"r": 2, "target_modules": ["q_proj", "lm_head"]}}
    with pytest.raises(RecipeError, match=r"cannot be merged .*leave merge out, or leave embeddings and head"):
        student(home, **block, merge=True)
    assert student(home, **block)
    assert student(home, **{**block, "model": str(home / "untied")}, merge=True)


@pytest.mark.parametrize("merge", [False, True])
def test_the_check_changes_neither_weights_nor_the_random_numbers_after_it(home, merge):
    block = {"model": str(home / "untied"), "peft": {"r": 2, "target_modules": "all-linear"}, "merge": merge}
    base = load_model(str(home / "untied"))
    torch.manual_seed(0)
    adapted = student(home, **block)
    drawn = torch.rand(3)
    assert difference(adapted, probe_log_probs(base)) == 0
    torch.manual_seed(0)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("init", ["eva", "corda", "loftq", "lora_ga"])
def test_initialisations_that_need_data_are_refused(home, init):
    with pytest.raises(RecipeError, match=f"init_lora_weights: {init} needs data"):
        student(home, model=str(home / "untied"), peft={"r": 2, "init_lora_weights": init})


@pytest.fixture(scope="module")
def adapters(home):
    """Trained adapters on the untied model, and their log-probabilities."""
    model = train(student(home, model=str(home / "untied"), peft={"r": 2, "target_modules": ["q_proj", "v_proj"]}))
    model.save_pretrained(home / "adapters")
    return home / "adapters", probe_log_probs(model)


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_without_a_peft_block_are_trained_further(home, adapters, tmp_path, merge):
    folder, expected = adapters
    further = student(home, model=str(folder), merge=merge)
    assert difference(further, expected) < 1e-6
    trained = [name for name, parameter in further.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    train(further)
    expected = probe_log_probs(further)
    (merged(further) if merge else further).save_pretrained(tmp_path)
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path), expected) < 1e-5


def test_adapters_with_a_peft_block_are_merged_below_the_new_ones(home, adapters, tmp_path):
    folder, expected = adapters
    block = {"model": str(folder), "peft": {"r": 3, "target_modules": ["o_proj"]}}
    with pytest.raises(RecipeError, match=r"holds adapters already.*leave peft out to go on .*or add merge"):
        student(home, **block)
    new = student(home, **block, merge=True)
    assert difference(new, expected) < 1e-5
    expected = probe_log_probs(train(new))
    new.merge_and_unload().save_pretrained(tmp_path)
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path), expected) < 1e-5


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_of_other_kinds_are_trained_further(home, tmp_path, config, merge, caplog):
    model = train(get_peft_model(load_model(str(home / "untied")), config))
    model.save_pretrained(tmp_path / "adapters")
    with caplog.at_level(logging.WARNING):
        further = student(home, model=str(tmp_path / "adapters"), merge=merge)
    assert difference(further, probe_log_probs(model)) < 1e-5
    assert ("transformers cannot load these adapters" in caplog.text) == (config.peft_type == "VERA" and not merge)
    expected = probe_log_probs(train(further))
    (merged(further) if merge else further).save_pretrained(tmp_path / "saved")
    assert difference(load_model(str(tmp_path / "saved")), expected) < 1e-5


def test_a_soft_prompt_is_no_student(home, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(str(home / "untied")), config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="holds a soft prompt, which is neither trained further nor merged"):
        student(home, model=str(tmp_path))


def test_merge_is_refused_for_a_model_without_adapters(home):
    with pytest.raises(RecipeError, match=r"merge is for adapters, and .*untied has none"):
        student(home, model=str(home / "untied"), merge=True)


def test_a_saved_model_that_differs_is_noticed(home, tmp_path):
    model = load_model(str(home / "untied"))
    expected = probe_log_probs(model)
    check_saved(home / "untied", expected, model)
    with pytest.raises(SavedModelDiffers, match=r"the saved model is another model .* differ by \d"):
        check_saved(home / "tied", expected, model)
    with pytest.raises(SavedModelDiffers, match="another model"):
        check_same(expected, train(model), "it", rounding=True)


def test_too_little_memory_for_the_comparisons_is_said(home, monkeypatch, caplog):
    model = load_model(str(home / "untied"))
    expected = probe_log_probs(model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with caplog.at_level(logging.WARNING):
        check_saved(home / "tied", expected, model)
        assert student(home, model=str(home / "untied"), peft={"r": 2, "target_modules": ["q_proj"]}, merge=True)
    assert "no memory to load the saved student" in caplog.text
    assert "no memory to try out merging the adapters" in caplog.text


def test_samples_show_a_change_of_most_numbers():
    weight = torch.zeros(10_000)
    before = samples([weight])
    assert 1000 <= len(before[0]) <= 1200
    assert before[0].equal(samples([weight])[0])
    assert not before[0].equal(samples([weight + 1])[0])
