"""The demo, shortened, and what ships with the package for it."""

from pathlib import Path

import pytest
from rich.console import Console

from understudy.data.load import load_data
from understudy.demo import TEACHER, run_demo
from understudy.evaluation.evaluate import evaluate
from understudy.generation.stop_tokens import stop_ids
from understudy.models.load import load_model, load_tokenizer
from understudy.playground.names import resolve
from understudy.playground.ship import LIMIT
from understudy.playground.vocabulary import tokenizer
from understudy.recipe import Data, load
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling


def test_the_shortened_demo_runs_to_its_table(tmp_path):
    console = Console(record=True, width=120, file=(tmp_path / "screen.txt").open("w"))
    rows = run_demo(tmp_path / "runs", quick=True, console=console)
    assert [row["model"].strip() for row in rows] == [
        "teacher",
        "student after SFT",
        "then supervised KD",
        "then GKD (λ = 0.5)",
    ]
    output = console.export_text()
    assert "points over its warm start" in output
    assert "points over supervised KD" in output
    assert (tmp_path / "runs" / "report" / "report.html").exists()
    assert str(tmp_path / "runs") in output
    teacher, warm, supervised, on_policy = rows
    assert warm["parameters"] * 10 <= teacher["parameters"]
    assert supervised["tokens"] > 0
    assert on_policy["tokens"] > 0
    assert (tmp_path / "runs" / "gkd" / "student" / "model.safetensors").exists()


def test_both_methods_of_the_demo_start_alike_and_train_on_the_same_problems():
    kd, gkd = (load(f"playground/{name}") for name in ("kd", "gkd"))
    assert (kd.student, kd.teacher, kd.data) == (gkd.student, gkd.teacher, gkd.data)
    assert {**kd.training, "max_steps": 0} == {**gkd.training, "max_steps": 0}


def test_the_shipped_teacher_is_small_and_has_the_vocabulary_of_the_code():
    folder = resolve(TEACHER)
    shipped, built = load_tokenizer(TEACHER), tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert load_model(TEACHER).config.vocab_size == len(built)
    assert sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) <= LIMIT


@pytest.mark.parametrize("seed", [11])
def test_the_shipped_teacher_solves_nine_of_ten_held_out_problems(seed):
    """200 problems of a split that it was not trained on; the documented figure is over more."""
    model, words = load_model(TEACHER, dtype="float32").eval(), load_tokenizer(TEACHER)
    examples = load_data(Data(dataset=TEACHER, split="test", limit=200, seed=seed), words, 256, 64)
    sampling = Sampling(max_new_tokens=64, temperature=0, stop_ids=tuple(stop_ids(words, model)))
    assert evaluate(model, words, examples, GenerateRollout(200), sampling).metrics["accuracy"] >= 0.9
