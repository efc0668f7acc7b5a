"""Code that comes with a model is never run, whatever is answered on the terminal."""

import json

import pytest
from folders import llama

from understudy.models.load import load_config, load_model, load_tokenizer
from understudy.recipe import RecipeError
from understudy.teachers.local import LocalTeacher

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path(r"{trace}").write_text("code of the model has run")
class Mine(LlamaConfig): model_type = "mine_of_a_test"
class MineForCausalLM(LlamaForCausalLM): config_class = Mine
class MineTokenizer(PreTrainedTokenizerFast): ...
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model with code of its own, which would run if somebody answered "y"."""
    folder = llama(tmp_path / "mine")
    (folder / "code_of_mine.py").write_text(CODE.format(trace=tmp_path / "trace"))
    config = json.loads((folder / "config.json").read_text())
    autos = {"AutoConfig": "code_of_mine.Mine", "AutoModelForCausalLM": "code_of_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine_of_a_test", "auto_map": autos}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "MineTokenizer",
        "auto_map": {"AutoTokenizer": [None, "code_of_mine.MineTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return str(folder), tmp_path / "trace"


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_model, lambda name: LocalTeacher(name).model])
def test_code_that_comes_with_a_model_never_runs(load, with_code):
    name, trace = with_code
    with pytest.raises(RecipeError, match="code that comes with a model is never run; to use such a model, read its"):
        load(name)
    assert not trace.exists()


@pytest.mark.parametrize("load", [load_model, lambda name, **options: LocalTeacher(name, options=options).model])
def test_code_that_comes_with_a_model_cannot_be_allowed_in_a_recipe(load, with_code):
    name, trace = with_code
    with pytest.raises(RecipeError, match="trust_remote_code is not supported: code that comes with a model is never"):
        load(name, trust_remote_code=True)
    assert not trace.exists()
