"""A signal after the last training step: what was trained is in a checkpoint, or the run ends first."""

import json
import os
import signal

import pytest
from folders import described, llama, sums
from rich.console import Console

from understudy.recipe import parse
from understudy.run.distill import distill
from understudy.run.folder import RunFolder
from understudy.training.signals import Interrupted
from understudy.training.trainer import StudentTrainer


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (1, "stopped after step 2; the same command resumes from there"),  # that of the last step
        (2, "stopped after step 2, which was the last one: the run is finished"),  # that after training
    ],
)
def test_a_signal_in_the_last_evaluations_of_a_run_without_checkpoints_loses_nothing(
    evaluation, message, tmp_path, monkeypatch
):
    llama(tmp_path / "teacher", num_hidden_layers=1)
    sums(tmp_path / "sums.jsonl")
    held_out = {"dataset": str(tmp_path / "sums.jsonl"), "split": "train", "limit": 2, "show": 0}
    content = described(tmp_path, method="sft", evaluate=held_out)
    content["training"] |= {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2}
    evaluate, count = StudentTrainer.evaluate, []

    def interrupted(self, *args, **kwargs):
        count.append(self.state.global_step)
        if len(count) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "evaluate", interrupted)
    console = Console(quiet=True)
    with pytest.raises(Interrupted, match=message) as stopped:
        distill(parse(content), console=console)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert count == [2] * evaluation
    folder = RunFolder(tmp_path / "run")
    assert folder.is_finished or folder.last_checkpoint()
    summary = distill(parse(content), console=console)
    assert summary == json.loads(folder.run_json.read_text())
    assert len(count) == 2, "nothing was trained again"
