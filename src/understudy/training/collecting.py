"""Collect what each optimizer step trains on; with `ahead`, the next step's in a thread while this one is trained on.

Step t trains on responses of the weights after t updates, or with `ahead` after t − 1: the thread begins with step
t − 1, and the optimizer waits for it before it changes the weights. So no copy of the weights is needed, all responses
of a step come from one set of weights, they are never older than one step, and none is discarded for its age.

The first step of a run and of an epoch generates its own responses; nothing is generated after the last step. A
checkpoint contains the responses that were generated ahead, from which a resumed run collects the same examples.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from ..batch import Example
from ..method import Method
from ..rollout import Rollout, Writer, Writers
from ..sampling import Sampling, Schedule
from ..step import Step
from .ahead_responses import RecordedResponses, RecordingRollout, ReplayingRollout, load_responses, save_responses
from .checkpoint import step_of
from .step_metrics import StepMetrics

_PATIENCE_S = 10.0  # for a thread that is to end because training has failed
_Batches = list[list[Example]]  # of the dataset


@dataclass(frozen=True)
class _Ahead:
    """The examples of a step that are collected in a thread."""

    step: Step
    epoch: Any  # the iterator that `loaded` comes from
    loaded: _Batches
    examples: Future[list[Example]]
    responses: RecordedResponses


class Collector:
    """Calls the method's `collect` for each step, in time or ahead.

    Raises:
        ValueError: for a schedule ahead that would communicate with other processes beside training.
    """

    def __init__(self, method: Method, writers: Writers, schedule: Schedule, accelerator: Accelerator) -> None:
        if schedule.ahead and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("a sharded student (FSDP, DeepSpeed) cannot generate while it is trained: set ahead to 0")
        if schedule.ahead and accelerator.num_processes > 1 and getattr(method, "reward", None) is not None:
            raise ValueError(
                "advantages compare the rewards of all processes, which a thread beside training cannot do: "
                "set ahead to 0, or train with one process"
            )
        self.method, self.writers, self.schedule, self.device = method, writers, schedule, accelerator.device
        self._processes = accelerator.num_processes
        self.restart()

    def restart(self, checkpoint: str | Path | None = None) -> None:
        """Begin a run, or continue after a checkpoint with what `save` saved in it."""
        self._cancelled = threading.Event()
        self._next: _Ahead | None = None  # being generated, or generated
        self._responses: dict[int, RecordedResponses] = {}  # ahead, by step: of this one and the next
        if checkpoint is not None and self.schedule.ahead:
            responses = load_responses(Path(checkpoint), self._processes)
            self._responses = {} if responses is None else {step_of(checkpoint): responses}

    def collect(
        self, epoch: Iterator[list[Example]], batches: int, step: Step, metrics: StepMetrics
    ) -> tuple[list[Example], int]:
        """The examples of `step`, and of how many batches they are: the next `batches` of the epoch, or fewer."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead.epoch is not epoch:  # a callback has ended that epoch early
            ahead, self._responses = None, {}
        loaded = list(islice(epoch, batches)) if ahead is None else ahead.loaded
        if not loaded:
            return [], 0
        with metrics.timer("generate"):
            examples = self._examples(ahead, loaded, step)
        self._responses = {number: x for number, x in self._responses.items() if number == step.number}
        if self.schedule.ahead:
            metrics.record({"staleness": torch.tensor(float(step.number in self._responses))})
        if self.schedule.ahead and step.number + 1 < step.total:
            with metrics.timer("generate"):  # the weights may have to be sent before the thread begins
                self._begin(epoch, batches, replace(step, number=step.number + 1))
        return examples, len(loaded)

    def _examples(self, ahead: _Ahead | None, loaded: _Batches, step: Step) -> list[Example]:
        if ahead is not None:
            return ahead.examples.result()
        restored = self._responses.get(step.number)
        if restored is not None:
            return self._collect(loaded, step, ReplayingRollout(restored, self.writers.student.rollout))
        return self._collect(loaded, step)

    def _begin(self, epoch: Iterator[list[Example]], batches: int, step: Step) -> None:
        """Collect the next step's examples in a thread, if the epoch has any."""
        loaded = list(islice(epoch, batches))
        if not loaded:
            return
        responses = RecordedResponses([])
        rollout = RecordingRollout(self.writers.student.rollout.for_thread(self._cancelled), responses)
        examples: Future[list[Example]] = Future()
        context = copy_context()

        def work() -> None:
            try:
                with ExitStack() as stack:
                    if self.device.type == "cuda":  # both are the thread's own
                        stack.enter_context(torch.cuda.device(self.device))
                        stack.enter_context(torch.cuda.stream(stream))
                    examples.set_result(context.run(self._collect, loaded, step, rollout))
            except BaseException as error:
                examples.set_exception(error)

        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
        self._next = _Ahead(step, epoch, loaded, examples, responses)
        threading.Thread(target=work, name="rollout ahead", daemon=True).start()

    def _collect(self, loaded: _Batches, step: Step, rollout: Rollout | None = None) -> list[Example]:
        """The method's examples; generated responses are cut to the prefix of this step."""
        writers = self.writers
        if not (self.schedule.truncates or rollout is not None):
            return self.method.collect(list(chain(*loaded)), writers, step)
        sampling, limits = writers.student.sampling, {}
        if self.schedule.truncates:
            limits = {"max_new_tokens": self.schedule.limit(step.number, step.total, sampling.max_new_tokens)}
        reads_all = getattr(self.method, "reward", None) is not None
        generated = sampling if reads_all else replace(sampling, **limits)
        writers = writers.with_student(Writer(rollout or writers.student.rollout, generated))
        examples = self.method.collect(list(chain(*loaded)), writers, step)
        return [cut(example, **limits) for example in examples]

    def wait(self) -> None:
        """Wait until no thread generates, before the weights change.

        Raises:
            Exception: what the thread raised.
        """
        if self._next is not None:
            self._next.examples.result()
            self._responses[self._next.step.number] = self._next.responses

    def close(self) -> None:
        """End the thread, if there is one: training has ended, perhaps by an error."""
        self._cancelled.set()
        if self._next is not None:
            wait_for([self._next.examples], _PATIENCE_S)

    def save(self, checkpoint: Path, writes: bool) -> None:
        """Save what was generated ahead for the next step to train; called on every process, of which one `writes`."""
        if self.schedule.ahead:
            save_responses(checkpoint, self._responses.get(step_of(checkpoint)), writes)


def cut(example: Example, max_new_tokens: int | None = None) -> Example:
    """The example with the first tokens of its response alone, if a model generated it."""
    if (
        max_new_tokens is None
        or example.author not in ("student", "teacher")
        or len(example.response) <= max_new_tokens
    ):
        return example
    streams = {name: values[:max_new_tokens] for name, values in example.streams.items()}
    trained = None if example.trained is None else example.trained[:max_new_tokens]
    response = example.response[:max_new_tokens]
    return replace(example, response=response, streams=streams, trained=trained, truncated=True)


def check_rollout(method: Method, rollout: Rollout | None, sampling: Sampling, schedule: Schedule) -> None:
    """Refuse sampling parameters and a schedule that the method or the rollout cannot follow.

    Raises:
        ValueError: with the remedy.
    """
    method.check_sampling(sampling)
    name = type(method).__name__
    schedule.check(sampling)
    if schedule.truncates and not method.authors & {"student", "teacher"}:
        raise ValueError(f"{name} trains on no generated responses, which a prefix would be of: leave prefix out")
    if schedule.truncates and method.reduction == "pair":
        raise ValueError(f"{name} compares whole responses: leave prefix and prefix_start out")
    if not schedule.ahead:
        return
    if "student" not in method.authors:
        raise ValueError(f"{name} trains on no responses of the student that could be generated ahead: set ahead to 0")
    if not method.collects_ahead:
        raise ValueError(f"{name} cannot collect a step's examples while another step is learned from: set ahead to 0")
    if rollout is None or not rollout.runs_ahead:
        raise ValueError(
            f"{type(rollout).__name__} cannot generate while the model is trained: set ahead to 0, or choose a rollout "
            "such as generate"
        )


class FinishAhead(TrainerCallback):
    """Waits for the responses that are generated ahead before the optimizer changes the weights."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.trainer.step_metrics.timer("generate"):
            self.trainer.collector.wait()
