"""A resumed run trains with the hyperparameters that are given now, and otherwise as it was saved."""

import shutil

import pytest
from loop import logged, trainer

from understudy.methods.kd import KD


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The uninterrupted run, and a folder with its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    options = {"lr_scheduler_type": "linear", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2}
    run = trainer(folder, KD(), **options)
    run.train()
    shutil.rmtree(folder / "checkpoint-4")
    return run, folder, options


def resumed(saved, folder, **changes):
    _, source, options = saved
    shutil.copytree(source, folder, dirs_exist_ok=True)
    again = trainer(folder, KD(), **{**options, **changes})
    again.train(resume_from_checkpoint=True)
    return again


def test_a_lower_learning_rate_takes_effect_in_a_resumed_run(saved, tmp_path):
    again = resumed(saved, tmp_path, learning_rate=0.005)
    expected = logged(saved[0], "learning_rate")
    assert logged(again, "learning_rate") == pytest.approx([*expected[:2], *(rate / 2 for rate in expected[2:])])


def test_another_weight_decay_takes_effect_in_a_resumed_run(saved, tmp_path):
    again = resumed(saved, tmp_path, weight_decay=0.0)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.0}
    assert logged(again, "learning_rate") == logged(saved[0], "learning_rate")


def test_more_steps_take_effect_in_a_resumed_run(saved, tmp_path):
    again = resumed(saved, tmp_path, max_steps=6, lr_scheduler_type="constant")
    assert again.state.global_step == 6
