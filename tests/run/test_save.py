"""What a run saves in student/: it behaves outside as it was evaluated, and comes back as it came."""

import json
import logging
import shutil

import pytest
import torch
from folders import characters, described, link_all, llama, sums
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from understudy.generation.stop_tokens import stop_ids
from understudy.models.load import load_model, load_tokenizer
from understudy.models.saved import SavedModelDiffers, probe_log_probs
from understudy.recipe import RecipeError, parse
from understudy.run import save
from understudy.run.distill import distill

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant={% endif %}"
)
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    things = tmp_path_factory.mktemp("things")
    llama(things / "teacher", num_hidden_layers=1)
    sums(things / "sums.jsonl")
    return things


@pytest.fixture
def home(tmp_path, things):
    link_all(things, tmp_path)
    return tmp_path


def run(home, student, method="sft", **changes):
    options = described(home, student=student, method=method, evaluate={"show": 0}, **changes)
    distill(parse(options))
    return home / "run" / "student"


def chat(folder):
    """A model whose chat template ends a turn with <s>, while its generation config stops at </s> alone."""
    tokenizer = characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    tokenizer.chat_template = TEMPLATE
    llama(folder, tokenizer=tokenizer, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=2, top_k=3, do_sample=True)
    model.config.use_cache = True
    model.save_pretrained(folder)
    return tokenizer


def test_the_student_stops_and_comes_back_as_it_came(home):
    tokenizer = chat(home / "base")
    student = run(home, {"model": str(home / "base")})
    stops = stop_ids(tokenizer, AutoModelForCausalLM.from_pretrained(home / "base"))
    assert stops == [1, 2]
    config = GenerationConfig.from_pretrained(student)
    assert config.eos_token_id == stops
    assert config.pad_token_id == 0
    assert (config.top_k, config.do_sample) == (3, True)
    saved = json.loads((student / "config.json").read_text())
    assert saved["use_cache"] is True
    assert saved["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(student / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(student).chat_template == TEMPLATE
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (home / "base", student))
    added = {"is_local", "local_files_only"}  # by transformers, of how it was loaded
    assert {key for key, value in after.items() if value != before.get(key)} <= added


def test_generate_ends_where_evaluation_ends(home):
    tokenizer = chat(home / "base")
    model = AutoModelForCausalLM.from_pretrained(run(home, {"model": str(home / "base")}), dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<s>")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = model.model.norm.weight.abs() * 0 + 1
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
    prompt = torch.tensor([[5, 9, 12]])
    assert model.generate(prompt, max_new_tokens=5, do_sample=False)[0, 3:].tolist() == [end]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"save_dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"peft": LORA, "merge": True}, torch.bfloat16),
        ({"save_dtype": "float16", "peft": LORA, "merge": True}, torch.float16),
    ],
)
def test_the_dtype_of_the_saved_student(home, block, expected):
    chat(home / "base")
    student = run(home, {"model": str(home / "base"), **block})
    assert {weight.dtype for weight in load_file(student / "model.safetensors").values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(student).dtype == expected


def test_adapters_come_with_the_stop_tokens_and_are_evaluated_with_them(home):
    tokenizer = chat(home / "base")
    student = run(home, {"model": str(home / "base"), "peft": LORA})
    assert GenerationConfig.from_pretrained(student).eos_token_id == stop_ids(tokenizer)
    assert load_model(str(student)).generation_config.eos_token_id == stop_ids(tokenizer)
    assert load_tokenizer(str(student)).chat_template == TEMPLATE
    shutil.rmtree(home / "run")


def test_a_generation_config_that_cannot_be_saved_is_repaired_with_a_warning(home, caplog):
    llama(home / "odd", num_hidden_layers=1)
    content = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 2, "max_length": 99}
    (home / "odd" / "generation_config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        student = run(home, {"model": str(home / "odd")})
    assert "generation_config has temperature: 0.9, which has no effect" in caplog.text
    saved = GenerationConfig.from_pretrained(student)
    saved.validate(strict=True)
    assert (saved.eos_token_id, saved.max_length) == (2, 99)
    assert saved.temperature in (None, 1.0)


def test_a_generation_config_that_contradicts_itself_is_replaced_by_its_tokens(home, caplog):
    llama(home / "odd", num_hidden_layers=1)
    content = {"num_return_sequences": 3, "do_sample": False, "eos_token_id": [2, 7]}
    (home / "odd" / "generation_config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        student = run(home, {"model": str(home / "odd")})
    assert "only its tokens are used" in caplog.text
    assert GenerationConfig.from_pretrained(student).eos_token_id == [2, 7]


def test_a_merge_that_goes_wrong_after_training_leaves_the_adapters(home, monkeypatch):
    merge = save.merged

    def wrong(model):
        result = merge(model)
        with torch.no_grad():
            result.lm_head.weight.mul_(2)
        raise SavedModelDiffers("the merged model is another model")

    monkeypatch.setattr(save, "merged", wrong)
    with pytest.raises(
        SavedModelDiffers, match=r"merged model is another model; student/ holds the adapters, unmerged"
    ):
        run(home, {"model": str(home / "teacher"), "peft": LORA, "merge": True})
    student = home / "run" / "student"
    assert (student / "adapter_model.safetensors").is_file()
    assert not (home / "run" / "student.partial").exists()
    assert torch.isfinite(probe_log_probs(load_model(str(student)))).all()


def test_adapters_are_trained_further_and_their_folder_is_a_student_again(home):
    first = run(home, {"model": str(home / "teacher"), "peft": LORA})
    first = first.rename(home / "adapters")
    shutil.rmtree(home / "run")
    second = run(home, {"model": str(first)}, method="kd")
    one, two = (load_file(place / "adapter_model.safetensors") for place in (first, second))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(home / "run")
    with pytest.raises(RecipeError, match="holds adapters already"):
        run(home, {"model": str(first), "peft": LORA})
    merged = run(home, {"model": str(first), "peft": LORA, "merge": True})
    assert not (merged / "adapter_config.json").exists()
