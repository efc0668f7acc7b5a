"""Checkpoints: complete or ignored, the newest complete one, rotation, and folders that somebody else wrote."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from fakes import ragged_examples, words
from loop import arguments, student, teacher, trainer
from transformers import TrainerState

from understudy.methods.kd import KD
from understudy.training import checkpoint
from understudy.training.checkpoint import last_checkpoint
from understudy.training.saving import SaveCheckpoints
from understudy.training.trainer import StudentTrainer


def write(folder, step, **files):
    """A complete checkpoint with some files."""
    path = folder / f"checkpoint-{step}"
    checkpoint.begin(path)
    for name, content in {"model.safetensors": "weights", "trainer_state.json": "{}", **files}.items():
        (path / name).write_text(content)
    checkpoint.complete(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.json", checkpoint.CONTENTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_a_damaged_checkpoint_is_ignored_and_the_older_one_is_taken(file, damage, tmp_path):
    write(tmp_path, 2)
    path = write(tmp_path, 10) / file
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10"), "numbers, not letters, are compared"
    content = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"empty": "", "cut": content[:-1], "changed": "[" + content[1:]}[damage])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    if file != checkpoint.CONTENTS or damage != "missing":
        [(newest, reason)] = checkpoint.damaged(tmp_path)
        assert newest.name == "checkpoint-10"
        assert file in reason


def test_a_checkpoint_that_was_not_saved_completely_is_ignored(tmp_path):
    write(tmp_path, 2)
    checkpoint.begin(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "model.safetensors").write_text("weights")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "not saved completely" in checkpoint.damaged(tmp_path)[0][1]


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None


def test_rotation_keeps_the_newest_steps_and_the_best_whatever_the_clock_says(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    os.utime(tmp_path / "checkpoint-8", (0, 0))
    checkpoint.begin(tmp_path / "checkpoint-10")
    state = TrainerState(global_step=10, best_model_checkpoint=str(tmp_path / "checkpoint-2"))
    args = SimpleNamespace(should_save=True, output_dir=str(tmp_path))
    SaveCheckpoints(3).on_save(args, state, None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-8"]
    assert checkpoint.damage(tmp_path / "checkpoint-10") is None


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_leaves_other_people_s_checkpoints_and_those_of_later_steps(limit, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "pytorch_model.bin").write_text("the only copy")
    (tmp_path / "checkpoint-best").mkdir()
    write(tmp_path, 77)
    run = trainer(tmp_path, KD(), save_strategy="steps", save_steps=1, save_total_limit=limit)
    run.train()
    own = ["checkpoint-3", "checkpoint-4"][-limit:]
    assert names(tmp_path) == sorted([*own, "checkpoint-500", "checkpoint-77", "checkpoint-best"])
    assert (tmp_path / "checkpoint-500" / "pytorch_model.bin").read_text() == "the only copy"


@pytest.mark.parametrize("name", ["checkpoint-4", "checkpoint-3"])
def test_a_run_that_would_overwrite_somebody_else_s_checkpoint_is_refused_before_training(name, tmp_path):
    path = tmp_path / name / "model.safetensors"
    path.parent.mkdir()
    path.write_text("the only copy")
    run = trainer(tmp_path, KD(), save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=f"{name} exists already and is no checkpoint of understudy"):
        run.train()
    assert run.state.global_step == 0
    assert path.read_text() == "the only copy"


def test_another_program_s_checkpoint_is_not_resumed_from(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"checkpoint-2 is no checkpoint of understudy"):
        trainer(tmp_path, KD()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_an_earlier_attempt_is_replaced_as_a_whole(tmp_path):
    (write(tmp_path, 4) / "model.safetensors.tmp").write_text("half")
    trainer(tmp_path, KD(), save_strategy="steps", save_steps=4).train()
    assert "model.safetensors.tmp" not in {path.name for path in (tmp_path / "checkpoint-4").iterdir()}


def test_a_half_deleted_checkpoint_is_still_the_run_s_own(tmp_path, monkeypatch):
    path = write(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "remove", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard(path)
    assert checkpoint.is_own(path)
    assert last_checkpoint(tmp_path) is None


def test_a_resumed_run_ends_a_deletion_that_was_interrupted(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer(tmp_path, KD(), **options).train()
    checkpoint.begin(tmp_path / "checkpoint-2")
    trainer(tmp_path, KD(), **options).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_resumed_run_is_not_evaluated_at_its_start_again(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "eval_on_start": True}
    dataset = {"eval_dataset": ragged_examples(2)}
    trainer(tmp_path, KD(), options=dataset, **options).train()
    run = trainer(tmp_path, KD(), options=dataset, **options)
    run.train(resume_from_checkpoint=True)
    assert [line["step"] for line in run.state.log_history if "eval_loss" in line] == [0]


def test_the_best_checkpoint_of_a_moved_folder_is_found(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.0}
    dataset = {"eval_dataset": ragged_examples(2)}
    trainer(tmp_path / "old", KD(), options=dataset, **options).train()
    shutil.rmtree(tmp_path / "old" / "checkpoint-4")
    (tmp_path / "old").rename(tmp_path / "new")
    run = trainer(tmp_path / "new", KD(), options=dataset, **options)
    run.train(resume_from_checkpoint=True)
    assert run.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")


def test_the_caller_s_arguments_are_not_changed(tmp_path):
    args = arguments(tmp_path, save_total_limit=1)
    before = args.to_dict() | {"accelerator_config": args.accelerator_config.to_dict()}
    run = StudentTrainer(student(), teacher(), KD(), processing_class=words(), args=args)
    assert args.to_dict() | {"accelerator_config": args.accelerator_config.to_dict()} == before
    assert not run.args.remove_unused_columns
