"""vLLM that generates with a student as it is now: started or reached, given the weights, started again if it ends.

Weights are loaded when responses are next needed, and not while they are generated, so that one response is of one
version. After every call the engine is asked for its version: if it was started again meanwhile, everything is
generated again with the student's weights and the same seeds.

The student is read in `prepare` alone, which writes its weights to a folder. The engine loads them from there, once
more if it was started again, while the student may already be trained in another thread.
"""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..method import from_all_processes, is_distributed, process_rank
from ..models.adapters import without_adapters
from ..teacher import TeacherError
from .client import Client
from .student_weights import WeightFolder, adapter_weights, check_adapters, model_weights
from .vllm_engine import Engine, Generated, Job, ServedEngine
from .vllm_process import VLLMProcess, is_alive

logger = logging.getLogger(__name__)
_ATTEMPTS = 3  # to generate the same responses
_LOST = "lost"  # of an attempt: the engine was started again, or has ended
_PATIENCE = timedelta(hours=2)  # of processes for each other, while one starts the server or its responses are long


class StudentEngine:
    """vLLM with the weights of `model`. All processes of a run call its methods together.

    Args:
        model: the student, with or without LoRA adapters, and not yet sharded.
        weights_folder: where weights are written for vLLM to read; None: in memory.
        vocabulary: tokens to which a padded vocabulary is cut in a vLLM that is started here; that of others stays.
        process_for: the server to start for the model in a folder; None: none is started.
        client_for: a client of the servers at some URLs.
        engine_for: an engine in this process for the model in a folder, in place of a server.
        urls: of servers that others have started.
    """

    def __init__(
        self,
        model: Any,
        weights_folder: str | None,
        *,
        vocabulary: int,
        process_for: Callable[[Path], VLLMProcess] | None = None,
        client_for: Callable[[Sequence[str]], Client] | None = None,
        engine_for: Callable[[Path], Engine] | None = None,
        urls: Sequence[str] = (),
    ) -> None:
        self.version = 0  # of the weights: how many optimizer steps they have behind them
        self.checked: set[int] = set()  # the versions at which the engine was compared with the student
        padded: int = model.get_input_embeddings().weight.shape[0]
        self.banned = range(vocabulary, padded if urls else vocabulary)  # ids that only the engine has
        self._model, self._parent, self._urls = model, weights_folder, list(urls)
        self._vocabulary = None if urls else vocabulary
        self._process_for, self._client_for, self._engine_for = process_for, client_for, engine_for
        self._has_adapters = check_adapters(model)
        self._folder: WeightFolder | None = None  # of the first process, as the server is
        self._process: VLLMProcess | None = None
        self._guard: int | None = None  # the process that runs the server, on this machine
        self._engine: Engine | None = None
        self._cancelled = threading.Event()  # of generating
        self._is_written = self._is_loaded = False  # the student's present weights
        # In a thread these processes communicate beside those of training, which must not mix.
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if is_distributed() else None

    @property
    def needs_check(self) -> bool:
        """Was it not yet compared with the student, at the start and after the weights have changed once?"""
        return len(self.checked) < 2 and self.version not in self.checked

    def weights_have_changed(self, version: int) -> None:
        """The student's weights are others than before, with `version` optimizer steps behind them."""
        self.version, self._is_written, self._is_loaded = version, False, False

    def prepare(self) -> None:
        """Let vLLM have the student's weights as they are now.

        Raises:
            TeacherError: if it cannot be started or does not answer, and if there is no room; on all processes.
        """
        self.write()
        if not self._is_loaded:
            self._on_first_process(self._load)
            if is_distributed():
                self._share()
            self._is_loaded = True

    def generate(self, jobs: Sequence[Job], cancelled: threading.Event | None = None) -> list[Generated]:
        """A response to each job; some processes may have none.

        Raises:
            TeacherError: if the engine does not answer or cannot be started again; on all processes.
            RuntimeError: when `cancelled` is set; on this process.
        """
        self._cancelled = cancelled or threading.Event()
        try:
            return self._generate(jobs)
        finally:
            self._cancelled = threading.Event()

    def from_all_processes(self, item: Any) -> list[Any]:
        """The item of every process."""
        return from_all_processes([item], self._group)

    def _generate(self, jobs: Sequence[Job]) -> list[Generated]:
        for _ in range(_ATTEMPTS):
            self.prepare()
            responses, error = self._attempt(jobs)
            outcomes = self.from_all_processes(error)
            if failures := [outcome for outcome in outcomes if outcome not in ("", _LOST)]:
                raise TeacherError(failures[0], on_all_processes=True)
            if _LOST not in outcomes:
                return responses
            logger.warning("vLLM has lost the student's weights, or has ended; they are loaded again")
            self._is_loaded = False
        raise TeacherError(f"vLLM ended or lost the student's weights {_ATTEMPTS} times in a row{self._log()}", True)

    def _attempt(self, jobs: Sequence[Job]) -> tuple[list[Generated], str]:
        """Responses, or what went wrong: `_LOST`, or an error."""
        assert self._engine is not None
        try:
            responses = self._engine.generate(jobs) if jobs else []
        except TeacherError as error:
            ended = not self._is_alive()
            return [], _LOST if ended or self._was_restarted() else str(error)
        return (responses, "") if not jobs or self._engine.has_loaded_weights() else ([], _LOST)

    def _was_restarted(self) -> bool:
        """Does the engine answer, but with other weights?"""
        return isinstance(self._engine, ServedEngine) and self._engine.was_restarted()

    def _check(self) -> None:
        """Raise what is to end requests that are under way."""
        if self._cancelled.is_set():
            raise RuntimeError("generating was cancelled")
        if not self._is_alive():
            raise TeacherError(f"the vLLM server that was started for this run has ended{self._log()}")

    def _is_alive(self) -> bool:
        """Is a server that was started for this run running? Others are waited for by the client."""
        return self._process.is_running if self._process else self._guard is None or is_alive(self._guard)

    def write(self) -> None:
        """Write the weights that have changed; those of a model below adapters once, if a vLLM is started with it.

        Raises:
            TeacherError: if there is no room; on all processes.
        """
        if self._is_written:
            return
        bare, starts = without_adapters(self._model), bool(self._process_for or self._engine_for)
        is_first = self._folder is None
        writes_model = not self._has_adapters or (starts and self.from_all_processes(is_first)[0])
        weights = model_weights(bare) if writes_model else {}
        adapters = adapter_weights(self._model) if self._has_adapters else {}

        def write() -> None:
            try:
                size = sum(weight.nbytes for weight in (*weights.values(), *adapters.values()))
                self._folder = self._folder or WeightFolder(self._parent, size)
                if writes_model:
                    self._folder.write_model(bare, weights, self._vocabulary)
                if self._has_adapters:
                    self._folder.write_adapters(self._model, adapters)
            except (OSError, SafetensorError) as error:
                place = self._parent or "memory or the folder for temporary files"
                raise TeacherError(
                    f"the student's weights cannot be written to {place} for vLLM ({error}): name a folder with room "
                    "in the rollout's weights"
                ) from None

        self._on_first_process(write)
        self._is_written = True

    def _load(self) -> None:
        """Start the server or the engine, unless it is there, and have it load what is written; again, if it ends."""
        for attempt in range(1, _ATTEMPTS + 1):
            self._start()
            try:
                return self._send()
            except TeacherError:
                if self._is_alive() or attempt == _ATTEMPTS:
                    raise

    def _start(self) -> None:
        assert self._folder is not None
        if self._process_for is not None and not (self._process and self._process.is_running):
            if self._process is None:
                self._process = self._process_for(self._folder.model)
                self._urls = [self._process.url]
            self._process.start()
            self._process.wait_until_ready()
        if self._engine is None:
            self._engine = self._engine_for(self._folder.model) if self._engine_for else self._served()

    def _send(self) -> None:
        assert self._engine is not None
        assert self._folder is not None
        if self._has_adapters:
            self._engine.load_adapters(self._folder.adapters_of(self._model))
        else:
            self._engine.load_model(self._folder.model)

    def _served(self) -> ServedEngine:
        assert self._client_for is not None
        return ServedEngine(self._client_for(self._urls), self._check)

    def _share(self) -> None:
        """Tell the other processes where the server is, and what it has loaded."""
        loaded = self._engine.loaded if isinstance(self._engine, ServedEngine) else None
        guard = None if self._process is None else self._process.pid
        everyone = self.from_all_processes((socket.gethostname(), self._urls, guard, loaded))
        host, self._urls, self._guard, loaded = everyone[0]
        if self._guard is not None and any(other[0] != host for other in everyone):
            raise TeacherError(
                "a server that rollout vllm has started is reached by processes on its own machine: start one yourself "
                "and name it by url, with a folder that all machines share in weights",
                on_all_processes=True,
            )
        self._engine = self._engine or self._served()
        assert isinstance(self._engine, ServedEngine)
        self._engine.loaded = loaded

    def _on_first_process(self, action: Callable[[], None]) -> None:
        """Do it on the first process; a TeacherError is raised on all."""
        error = ""
        if process_rank() == 0:
            try:
                action()
            except TeacherError as failure:
                error = str(failure)
        if message := self.from_all_processes(error)[0]:
            raise TeacherError(message, on_all_processes=True)

    def _log(self) -> str:
        return "" if self._process is None else f": see {self._process.log}"
