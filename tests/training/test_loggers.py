"""Experiment loggers are told method, teacher, rollout and sampling, and get one run for each training."""

import json
from pathlib import Path

import pytest
from fakes import ragged_examples
from loop import short_sampling, trainer
from transformers.integrations import TrackioCallback

from understudy.budget import Budget
from understudy.divergences import JensenShannon
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.reward import Reward


class Logger(TrackioCallback):
    """Its run ends with the training, and a later log line needs a run again."""

    def __init__(self):
        self.runs = []
        self.is_open = False

    def setup(self, args, state, model, **kwargs):
        self.is_open = True
        self.runs.append((args.run_name, args.to_dict()))
        json.loads(args.to_json_string())
        assert args.to_sanitized_dict()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.is_open:
            self.setup(args, state, model)

    def on_log(self, args, state, control, model=None, **kwargs):
        if not self.is_open:
            self.setup(args, state, model)

    def on_train_end(self, *_, **__):
        self.is_open = False


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


def test_a_logger_is_told_method_teacher_rollout_and_sampling(tmp_path):
    logger = Logger()
    method = GKD(divergence=JensenShannon(0.1), distillation=0.5, reward=Reward([short]))
    run = trainer(tmp_path, method, options={"callbacks": [logger], "budget": Budget(tokens=10_000)}, max_steps=1)
    run.train()
    [(_, config)] = logger.runs
    assert config["learning_rate"] == 1e-2
    parts = config["distillation"]
    gkd = parts["method"]["GKD"]
    assert gkd["divergence"]["JensenShannon"]["beta"] == 0.1
    assert gkd["on_policy"] == 1.0
    assert gkd["reward"] == {"short": 1.0, "normalize": False}
    assert parts["teacher"] == {"LocalTeacher": {"model": None}}
    assert parts["rollout"] == {"GenerateRollout": {"batch_size": 64, "compiled": None}}
    assert parts["sampling"]["Sampling"]["max_new_tokens"] == short_sampling().max_new_tokens
    assert parts["budget"]["Budget"] == {"tokens": 10_000, "seconds": None}
    assert "distillation" not in run.args.to_dict()


def test_an_evaluation_after_training_continues_the_same_run(tmp_path):
    logger, other = Logger(), Logger()
    run = trainer(tmp_path, DPKD(), options={"callbacks": [logger], "eval_dataset": ragged_examples(3)}, max_steps=1)
    run.train()
    run.evaluate()
    names = [name for name, _ in logger.runs]
    assert len(names) == 2
    assert names[0] == names[1] is not None
    assert Path(tmp_path).name in names[0]
    assert run.args.run_name is None
    trainer(tmp_path, DPKD(), options={"callbacks": [other]}, max_steps=1, run_name="mine").train()
    assert [name for name, _ in other.runs] == ["mine"]


def test_trackio_has_one_run_with_the_method_in_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    run = trainer(
        tmp_path / "run",
        GKD(),
        options={"eval_dataset": ragged_examples(3)},
        max_steps=2,
        report_to="trackio",
        project="tests",
        trackio_static_space_id=False,
    )
    run.train()
    run.evaluate()
    runs = trackio.Api().runs("tests")
    assert len(runs) == 1
    assert runs[0].config["distillation"]["method"]["GKD"]["on_policy"] == 1.0
