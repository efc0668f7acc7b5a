"""Responses generated a step ahead, and truncated ones: the same examples as by the definition, and exact resumes."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from fakes import ragged_examples
from loop import logged, same, student, trainer, weights
from transformers import TrainerCallback

from understudy.divergences import ReverseKL
from understudy.method import Method
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.opd import OPD
from understudy.methods.promptkd import PromptKD
from understudy.methods.seqkd import SeqKD
from understudy.models.twin import is_twin, twin_of
from understudy.reward import Reward
from understudy.rollout import Writers
from understudy.rollouts.continuous import ContinuousRollout
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling, Schedule
from understudy.step import Step
from understudy.training.checkpoint import last_checkpoint
from understudy.training.collecting import Collector, cut
from understudy.training.signals import StopOnSignal

AHEAD = {"schedule": Schedule(ahead=1)}
METHODS = {
    "gkd": lambda: GKD(on_policy=0.7, mix="example"),
    "opd": OPD,
    "promptkd": lambda: PromptKD(prompt_tokens=2, prompt_lr=1e-2),
}


class Noted(TrainerCallback):
    """The weights before every step, and the examples that were trained on."""

    def __init__(self, run):
        self.run, self.weights, self.examples = run, [], []
        before = run.method.before_step

        def noted(batches, *others):
            self.weights.append(weights(run.model))
            self.examples.append([e for batch in batches for e in batch.examples])
            before(batches, *others)

        run.method.before_step = noted


@pytest.mark.parametrize("name", METHODS)
def test_each_response_is_what_the_weights_of_one_step_earlier_write(name, tmp_path):
    """Re-generated from the noted weights. An epoch has three steps, and its first one generates its own responses."""
    model = student("gpt2")  # with dropout
    run = trainer(tmp_path, METHODS[name](), model=model, examples=ragged_examples(12), max_steps=7, options=AHEAD)
    noted = Noted(run)
    run.train()
    staleness = [0, 1, 1, 0, 1, 1, 0]
    assert logged(run, "staleness") == staleness
    for number, examples in enumerate(noted.examples):
        model.load_state_dict(noted.weights[number - staleness[number]], strict=False)
        mine = [e for e in examples if e.author == "student"]
        again = run.writers.student(mine, Step(number, run.args.seed), logprobs=name == "opd")
        assert [e.response for e in again] == [e.response for e in mine]
        for one, other in zip(again, mine, strict=True):
            assert one.streams.keys() == other.streams.keys() == ({"sampled_logprob"} if name == "opd" else set())
            for stream in one.streams:
                assert one.streams[stream] == pytest.approx(other.streams[stream], abs=1e-5)
    assert any(e.author == "student" for part in noted.examples for e in part)


def test_the_thread_changes_neither_the_random_numbers_of_training_nor_its_mode(tmp_path):
    """Dropout draws the same masks: with a rate of 0 the weights stay, so both runs see the same responses."""
    runs = []
    for ahead in (0, 1):
        run = trainer(
            tmp_path, GKD(), model=student("gpt2"), learning_rate=0.0, options={"schedule": Schedule(ahead=ahead)}
        )
        run.train()
        runs.append((logged(run), logged(run, "grad_norm"), torch.get_rng_state()))
    assert runs[0][:2] == runs[1][:2]
    assert torch.equal(runs[0][2], runs[1][2])
    assert len(set(runs[0][0])) == 4


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(("kind", "stop"), [("gpt2", 2), ("gpt2", 3), ("llama+lora", 5)])
def test_a_resumed_run_ends_with_the_same_weights(kind, stop, tmp_path):
    """In the middle and at the end of an epoch of three steps, with accumulation, a rising prefix and evaluation."""
    schedule = {"schedule": Schedule(ahead=1, prefix_start=2)}
    changed = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    changed |= {"eval_strategy": "steps", "eval_steps": 1}

    def run(folder, **extra):
        options = schedule | {"eval_dataset": ragged_examples(4, seed=9), **extra}
        return trainer(folder, OPD(), model=student(kind), examples=ragged_examples(11), options=options, **changed)

    whole = run(tmp_path / "whole")
    whole.train()
    first = run(tmp_path / "parts", callbacks=[StopAfter(stop)])
    first.train()
    checkpoint = last_checkpoint(str(tmp_path / "parts"))
    assert (tmp_path / "parts" / f"checkpoint-{stop}" / "ahead.json").exists() == (stop != 3)
    second = run(tmp_path / "parts")
    second.train(resume_from_checkpoint=checkpoint)
    assert same(weights(second.model), weights(whole.model))
    assert logged(second, "loss") == logged(whole, "loss")
    assert logged(second, "staleness") == [0, 1, 1, 0, 1, 1]
    (tmp_path / "parts" / f"checkpoint-{stop}" / "ahead.json").unlink(missing_ok=True)
    without = run(tmp_path / "parts")
    without.train(resume_from_checkpoint=checkpoint)
    assert same(weights(without.model), weights(whole.model)) == (stop == 3), "the responses matter"


class Failing(GenerateRollout):
    """Fails at step 2, in whichever thread."""

    def generate(self, prompts, sampling, step):
        if step.number == 2:
            raise ValueError("the engine has lost its power supply")
        return super().generate(prompts, sampling, step)


def test_an_error_in_the_thread_ends_the_run_with_its_own_sentence(tmp_path):
    run = trainer(tmp_path, GKD(), rollout=Failing(), options=AHEAD)
    with pytest.raises(ValueError, match=r"^the engine has lost its power supply$"):
        run.train()
    assert run.state.global_step == 1, "the step before has not changed the weights"


class Slow(GenerateRollout):
    """Takes a minute for a response that is generated ahead, unless it is cancelled."""

    def for_thread(self, cancelled):
        rollout = super().for_thread(cancelled)
        respond = rollout._respond

        def slow(*arguments):
            cancelled.wait(60)
            return respond(*arguments)

        rollout._respond = slow
        return rollout


def test_an_error_while_the_thread_generates_ends_it(tmp_path):
    class Broken(GKD):
        def loss(self, *arguments):
            raise KeyboardInterrupt  # as a second Ctrl-C

    run = trainer(tmp_path, Broken(), rollout=Slow(), options=AHEAD)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout ahead"]


def test_a_signal_ends_the_run_after_the_step_with_the_responses_of_the_next(tmp_path):
    stop = StopOnSignal()

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            stop.signal = 15 if state.global_step == 1 else None

    run = trainer(tmp_path, GKD(), options=AHEAD | {"callbacks": [Signal(), stop]}, save_strategy="steps")
    run.train()
    assert run.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "ahead.json").exists()


def test_a_twin_has_the_weights_memory_and_its_own_mode():
    model = student("llama+lora").train()
    twin = twin_of(model)
    assert is_twin(twin, model)
    assert not any(module.training for module in twin.modules())
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(weights(twin), weights(model))
    adapter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    adapter.data = adapter.data.clone()
    assert not is_twin(twin, model)


def lengths(run):
    noted = Noted(run)
    run.train()
    return [[len(e.response) for e in part] for part in noted.examples], weights(run.model)


def test_a_prefix_trains_on_the_first_tokens_of_the_same_responses(tmp_path):
    """A reward reads whole responses, which are cut afterwards; otherwise no more tokens are generated."""
    texts = []

    def reward(prompts, responses, rows):
        texts.extend(responses)
        return [float(len(r)) for r in responses]

    for method in (GKD(), GKD(distillation=0.999999, divergence=ReverseKL(), reward=Reward([reward]))):
        runs = [
            trainer(tmp_path, replace(method), learning_rate=0.0, options={"schedule": schedule})
            for schedule in (Schedule(), Schedule(prefix=2))
        ]
        noted = [Noted(run) for run in runs]
        for run in runs:
            run.train()
        for whole, short in zip(noted[0].examples, noted[1].examples, strict=True):
            by_row = {e.row: cut(e, 2) for e in whole}
            assert {e.row: (e.response, e.truncated) for e in short} == {
                row: (e.response, e.truncated) for row, e in by_row.items()
            }
            assert any(len(e.response) > 2 for e in whole)
    assert max(len(text.split()) for text in texts) > 2


@pytest.mark.parametrize("schedule", [Schedule(prefix=6), Schedule(prefix_start=6), Schedule(prefix=6, prefix_start=6)])
def test_limits_that_are_the_longest_response_change_nothing(schedule, tmp_path):
    runs = [lengths(trainer(tmp_path, GKD(), options={"schedule": s})) for s in (Schedule(), schedule)]
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_the_limit_rises_linearly_to_the_last_step(tmp_path):
    run = trainer(tmp_path, GKD(), options={"schedule": Schedule(prefix_start=1)}, sampling=Sampling(7), max_steps=4)
    found, _ = lengths(run)
    assert [max(part) for part in found[:3]] == [1, 3, 5]  # responses of the last step may end before the limit, 7
    assert max(found[3]) > 5
    assert [Schedule(prefix_start=2, prefix=4).limit(k, 3, 9) for k in range(3)] == [2, 3, 4]


def test_the_teachers_responses_are_cut_and_the_datasets_are_not(tmp_path):
    found, _ = lengths(trainer(tmp_path, SeqKD(), options={"schedule": Schedule(prefix=1)}))
    assert {length for part in found for length in part} == {1}
    mixed = trainer(tmp_path, GKD(on_policy=0.5, mix="example"), options={"schedule": Schedule(prefix=1)})
    noted = Noted(mixed)
    mixed.train()
    examples = [e for part in noted.examples for e in part]
    assert {len(e.response) for e in examples if e.author == "student"} == {1}
    assert max(len(e.response) for e in examples if e.author == "dataset") > 1


REFUSED: dict[str, tuple[Method, dict, dict, str]] = {
    "teacher": (DPKD(), {"ahead": 1}, {}, "cannot collect a step's examples"),
    "no student": (SeqKD(), {"ahead": 1}, {}, "no responses of the student"),
    "continuous": (GKD(), {"ahead": 1}, {"rollout": ContinuousRollout()}, "ContinuousRollout cannot generate while"),
    "pairs": (DPKD(), {"prefix": 3}, {}, "compares whole responses"),
    "dataset": (KD(), {"prefix": 3}, {}, "trains on no generated responses"),
    "too long": (GKD(), {"prefix": 7}, {}, "has no effect"),
    "falling": (GKD(), {"prefix": 2, "prefix_start": 3}, {}, "rise from prefix_start, 3, to prefix, 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_before_training(name, tmp_path):
    method, fields, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, method, options={"schedule": Schedule(**fields)}, **options)


REWARDED = GKD(distillation=0.5, divergence=ReverseKL(), reward=Reward([lambda prompts, responses: [0.0]]))


@pytest.mark.parametrize(
    ("kind", "method", "message"), [("MULTI_CPU", REWARDED, "advantages compare"), ("FSDP", GKD(), "a sharded student")]
)
def test_processes_that_would_communicate_in_two_threads_are_refused(kind, method, message):
    two: Any = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        Collector(method, Writers(), Schedule(ahead=1), two)


@pytest.mark.parametrize("fields", [{"ahead": 2}, {"prefix": 0}, {"prefix_start": 0}])
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=r"ahead to 0 or 1|>= 1"):
        Schedule(**fields)
