"""vLLM that generates with a student as it is now: started or reached, given the weights, started again if it ends.

Weights are loaded when responses are next needed, and not while they are generated, so that one response is of one
version. After every call the engine is asked for its version: if it was started again meanwhile, everything is
generated again with the student's weights and the same seeds.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..method import from_all_processes, is_distributed, process_rank
from ..teacher import TeacherError
from .client import Client
from .student_weights import WeightFolder, has_adapters
from .vllm_engine import Engine, Generated, Job, ServedEngine
from .vllm_process import VLLMProcess

logger = logging.getLogger(__name__)
_ATTEMPTS = 3  # to generate the same responses
_LOST = "lost"  # of an attempt: the engine was started again, or has ended


class StudentEngine:
    """vLLM with the weights of `model`.

    Args:
        model: the student, with or without LoRA adapters.
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
        self._model, self._parent, self._urls = model, weights_folder, list(urls)
        self._vocabulary = None if urls else vocabulary
        self._process_for, self._client_for, self._engine_for = process_for, client_for, engine_for
        self._folder: WeightFolder | None = None
        self._process: VLLMProcess | None = None
        self._engine: Engine | None = None
        self._is_current = False  # has the engine the student's weights?

    @property
    def needs_check(self) -> bool:
        """Was it not yet compared with the student, at the start and after the weights have changed once?"""
        return len(self.checked) < 2 and self.version not in self.checked

    def weights_have_changed(self, version: int) -> None:
        """The student's weights are others than before, with `version` optimizer steps behind them."""
        self.version, self._is_current = version, False

    def generate(self, jobs: Sequence[Job]) -> list[Generated]:
        """A response to each job. All processes of a run call it together, also without jobs.

        Raises:
            TeacherError: if the engine does not answer or cannot be started again; on all processes.
        """
        error = ""
        for _ in range(_ATTEMPTS):
            self._load()
            responses, error = self._attempt(jobs)
            outcomes = from_all_processes([error])
            if failures := [outcome for outcome in outcomes if outcome not in ("", _LOST)]:
                raise TeacherError(failures[0], on_all_processes=True)
            if _LOST not in outcomes:
                return responses
            logger.warning("vLLM has lost the student's weights, or has ended; they are loaded again")
            self._is_current = False
        raise TeacherError(f"vLLM ended or lost the student's weights {_ATTEMPTS} times in a row{self._log()}", True)

    def _attempt(self, jobs: Sequence[Job]) -> tuple[list[Generated], str]:
        """Responses, or what went wrong: `_LOST`, or an error."""
        assert self._engine is not None
        try:
            responses = self._engine.generate(jobs, self._is_alive) if jobs else []
        except TeacherError as error:
            ended = not self._is_alive()
            return [], _LOST if ended or self._was_restarted() else str(error)
        return (responses, "") if not jobs or self._engine.has_loaded_weights() else ([], _LOST)

    def _was_restarted(self) -> bool:
        """Does the engine answer, but with other weights?"""
        return isinstance(self._engine, ServedEngine) and self._engine.was_restarted()

    def _is_alive(self) -> bool:
        """Is a server that this process has started running? Others are waited for by the client."""
        return self._process is None or self._process.is_running

    def _load(self) -> None:
        """Let the engine have the student's weights; by the first process, for all."""
        if self._is_current:
            return
        error = ""
        if process_rank() == 0:
            try:
                self._connect()
                self._send()
            except TeacherError as failure:
                error = str(failure)
        if failures := list(filter(None, from_all_processes([error]))):
            raise TeacherError(failures[0], on_all_processes=True)
        if is_distributed():
            self._share()
        self._is_current = True

    def _connect(self) -> None:
        """Start the server or the engine, unless it is there."""
        self._folder = self._folder or WeightFolder(self._parent)
        if self._process_for is not None and not (self._process and self._process.is_running):
            folder = self._folder.write_model(self._model, self._vocabulary)
            if self._process is None:
                self._process = self._process_for(folder)
                self._urls = [self._process.url]
            self._process.start()
            self._process.wait_until_ready()
        if self._engine is None and self._engine_for is not None:
            self._engine = self._engine_for(self._folder.write_model(self._model, self._vocabulary))
        elif self._engine is None:
            self._engine = self._served()

    def _send(self) -> None:
        assert self._engine is not None
        assert self._folder is not None
        if has_adapters(self._model):
            self._engine.load_adapters(self._folder.write_adapters(self._model))
        else:
            self._engine.load_model(self._folder.write_model(self._model, self._vocabulary))

    def _served(self) -> ServedEngine:
        assert self._client_for is not None
        return ServedEngine(self._client_for(self._urls))

    def _share(self) -> None:
        """Tell the other processes where the server is, and what it has loaded."""
        own = self._engine.loaded if process_rank() == 0 and isinstance(self._engine, ServedEngine) else None
        [(self._urls, loaded)] = from_all_processes([] if own is None else [(self._urls, own)])
        self._engine = self._engine or self._served()
        assert isinstance(self._engine, ServedEngine)
        self._engine.loaded = loaded

    def _log(self) -> str:
        return "" if self._process is None else f": see {self._process.log}"
