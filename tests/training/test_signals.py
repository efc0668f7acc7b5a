"""Signals: a checkpoint after the current step, the exit code of the signal, and what is ignored stays ignored."""

import os
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from understudy.training.signals import Interrupted, StopOnSignal

ARGS = SimpleNamespace(world_size=1)
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step_with_a_checkpoint(number):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    control = TrainerControl()
    with StopOnSignal() as stop:
        stop.on_step_end(ARGS, TrainerState(global_step=1), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        (stop.on_evaluate if number == signal.SIGHUP else stop.on_step_end)(ARGS, TrainerState(global_step=2), control)
        assert control.should_save
        assert control.should_training_stop
        assert {each: signal.getsignal(each) for each in SIGNALS} == before, "a second one ends the run at once"
    assert stop.signal == number
    assert Interrupted(2, number).exit_code == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[number.name]


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
