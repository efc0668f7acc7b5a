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
from understudy.playground.ship import LIMITS
from understudy.playground.vocabulary import tokenizer
from understudy.recipe import Data, load
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling

STUDENT = "playground:arithmetic-student"


def test_the_shortened_demo_runs_to_its_table_and_its_picture(tmp_path):
    console = Console(record=True, width=80, file=(tmp_path / "screen.txt").open("w"))
    comparison = run_demo(tmp_path / "runs", quick=True, samples=True, seed=3, console=console)
    assert {row.name for row in comparison.rows} == {"sft", "kd", "gkd"}
    assert all(row.tokens is not None and set(row.gain) == {"greedy"} for row in comparison.rows)
    output = console.export_text()
    for text in ("teacher", "warm start", "supervised KD", "GKD gains", "the difference is", str(tmp_path / "runs")):
        assert text in output
    assert max(map(len, output.splitlines())) <= 80 + len(str(tmp_path)) * 2
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert page.index("Accuracy over training tokens") < page.index("<h2>Results</h2>")
    student = tmp_path / "runs" / "gkd" / "seed-3" / "student"
    assert (student / "model.safetensors").exists()


def test_the_methods_of_the_demo_start_alike_and_train_on_the_same_problems_for_as_long():
    sft, kd, gkd = (load(f"playground/{name}") for name in ("sft", "kd", "gkd"))
    assert sft.student == kd.student == gkd.student
    assert sft.data == kd.data == gkd.data
    assert sft.training == kd.training == gkd.training
    warm_start = load("playground/warm_start")
    assert warm_start.data == gkd.data


def test_the_shipped_student_is_small_and_can_be_made_again():
    model = load_model(STUDENT)
    assert Path(resolve(STUDENT), "model.safetensors").stat().st_size <= LIMITS[STUDENT]
    fields = load("playground/warm_start").student.fresh or {}
    assert {name: getattr(model.config, name) for name in fields if name != "initializer_range"} == {
        name: value for name, value in fields.items() if name != "initializer_range"
    }
    assert load_tokenizer(STUDENT).get_vocab() == tokenizer().get_vocab()


def test_the_shipped_teacher_is_small_and_has_the_vocabulary_of_the_code():
    folder = resolve(TEACHER)
    shipped, built = load_tokenizer(TEACHER), tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert load_model(TEACHER).config.vocab_size == len(built)
    assert sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) <= LIMITS[TEACHER]


@pytest.mark.parametrize("seed", [11])
def test_the_shipped_teacher_solves_nine_of_ten_held_out_problems(seed):
    """200 problems of a split that it was not trained on; the documented figure is over more."""
    model, words = load_model(TEACHER, dtype="float32").eval(), load_tokenizer(TEACHER)
    examples = load_data(Data(dataset=TEACHER, split="test", limit=200, seed=seed), words, 256, 64)
    sampling = Sampling(max_new_tokens=64, temperature=0, stop_ids=tuple(stop_ids(words, model)))
    assert evaluate(model, words, examples, GenerateRollout(200), sampling).metrics["accuracy"] >= 0.9
