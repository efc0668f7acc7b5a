"""Trainer callbacks: complete log files, Ctrl-C, gradients that are not finite, synced rollouts."""

import json
from types import SimpleNamespace

import pytest
import torch
from fakes import ScriptedRollout, tiny
from loop import trainer
from transformers import TrainerState

from understudy.methods.kd import KD
from understudy.training.callbacks import (
    CheckGradients,
    LogMetrics,
)

ARGS = SimpleNamespace(seed=0, world_size=1, fp16=False, output_dir="runs/x")


def state_at(step, total=10, **fields):
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=True, **fields)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_log_line_becomes_a_line_of_the_file(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    run = trainer(tmp_path, KD(), options={"callbacks": [LogMetrics(path)]}, logging_steps=2)
    run.train()
    lines = [line for line in lines_of(path) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    logged = [line for line in run.state.log_history if "loss" in line]
    assert [line["forward_kl"] for line in lines] == [line["forward_kl"] for line in logged]


def test_a_resumed_run_writes_the_file_as_it_was_at_its_checkpoint(tmp_path):
    """Without what was logged after the checkpoint, at its own step too, and without torn or lost lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "train_runtime": 2}\n{"step": 6, "loss": 3}\n{"step": 7, "lo')
    watch = LogMetrics(path)
    history = [{"loss": 1, "step": 2}, {"loss": 2, "note": "a\u2028b", "step": 4}]
    watch.on_train_begin(ARGS, state_at(4, log_history=history), None)
    watch.on_log(ARGS, state_at(6), None, {"loss": 5.0})
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [*history, {"step": 6, "loss": 5.0}]


def test_a_run_from_the_start_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n')
    LogMetrics(path).on_train_begin(ARGS, state_at(0), None)
    assert path.read_text() == ""


def test_only_the_first_process_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    other = TrainerState(global_step=1, is_world_process_zero=False)
    LogMetrics(path).on_train_begin(ARGS, other, None)
    LogMetrics(path).on_log(ARGS, other, None, {"loss": 1.0})
    assert not path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_in_any_parameter(value):
    model = tiny("llama")
    parameters = list(model.parameters())
    parameters[0].grad = torch.zeros_like(parameters[0])
    CheckGradients().on_pre_optimizer_step(ARGS, state_at(3), None, model=model)
    parameters[-1].grad = torch.zeros_like(parameters[-1])
    parameters[-1].grad.view(-1)[3] = value
    with pytest.raises(FloatingPointError, match="at step 3, though the loss is a number"):
        CheckGradients().on_pre_optimizer_step(ARGS, state_at(3), None, model=model)


class Synced(ScriptedRollout):
    """Records the steps of its `sync` calls."""

    def sync(self, step):
        self.calls.append(step.number)


def test_a_rollout_is_synced_when_the_student_s_weights_have_changed(tmp_path):
    rollout = Synced()
    run = trainer(tmp_path, KD(), rollout=rollout, max_steps=3)
    run.train()
    assert rollout.calls == [0, 1, 2, 3, 3], "and once more at the end, when the best checkpoint may have been loaded"
