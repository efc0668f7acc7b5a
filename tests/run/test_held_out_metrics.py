"""Metrics of the student's responses while it is trained: exposure bias, also for a method without a teacher."""

import pytest
from folders import jsonl, llama

from understudy.evaluation.evaluate_model import evaluate_model
from understudy.evaluation.settings import EvalSettings
from understudy.files import read_jsonl
from understudy.recipe import Data, RecipeError, parse
from understudy.run.distill import distill


@pytest.fixture
def recipe(tmp_path):
    llama(tmp_path / "teacher", seed=1)
    llama(tmp_path / "student", seed=2)
    data = jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(8)])
    return {
        "student": {"model": str(tmp_path / "student")},
        "teacher": {"local": {"model": str(tmp_path / "teacher")}},
        "method": {"sft": {}},
        "rollout": {"generate": {"max_new_tokens": 4, "temperature": 0}},
        "data": {"dataset": str(data), "max_length": 16},
        "evaluate": {"dataset": str(data), "exposure_bias": 5, "show": 0},
        "training": {"max_steps": 2, "use_cpu": True, "output_dir": str(tmp_path / "run"), "eval_strategy": "steps"}
        | {"eval_steps": 1, "save_strategy": "no", "report_to": "none"},
    }


def test_exposure_bias_during_training_is_that_of_an_evaluation(recipe, tmp_path):
    distill(parse(recipe))
    values = [
        line["eval_exposure_bias"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line
    ]
    assert len(values) >= 2
    settings = EvalSettings(
        Data(dataset=recipe["data"]["dataset"], split="train", limit=5), temperature=1.0, max_new_tokens=4
    )
    settings = settings.changed(teacher=str(tmp_path / "teacher"), exposure_bias=True)
    after = evaluate_model(str(tmp_path / "run" / "student"), settings).metrics["exposure_bias"]
    assert values[-1] == pytest.approx(after, rel=1e-4)


def test_exposure_bias_needs_a_teacher_and_held_out_data(recipe):
    without = {**recipe, "evaluate": {"exposure_bias": 5}, "training": {"max_steps": 2, "use_cpu": True}}
    for changes, message in (
        ({"teacher": None}, "exposure bias needs a teacher that can generate"),
        ({"evaluate": {"exposure_bias": 5}, "training": without["training"]}, "metrics need held-out data"),
    ):
        with pytest.raises(RecipeError, match=message):
            distill(parse({**recipe, **changes}))
