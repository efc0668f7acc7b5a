"""A vLLM server as a child process: started, waited for, and ended with this process, however that ends."""

import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx2
import psutil

from ..teacher import TeacherError
from . import child_guard

_POLL = 0.2  # seconds between questions whether the server is ready
_LAST = 2000  # characters at the end of the log in which an error is looked for
# What torchrun tells its processes. The server is none of them, and would wait for a store that is not there.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


class VLLMProcess:
    """`python -m vllm.entrypoints.openai.api_server` on the loopback interface, with its output in a file.

    A guard process starts the server and ends it when it is told to or when this process is gone. So no server is
    left behind by Ctrl-C, SIGTERM or SIGKILL, and Ctrl-C, which a terminal sends to a whole process group, does not
    reach the server while a run completes its step.

    Args:
        model: name or folder, as vLLM's own --model.
        log: the file to which the server's output is appended.
        python: the interpreter that has vLLM; by default this one.
        port: by default a free one, which stays the same when the server is started again.
        options: of vLLM's command line, such as {"max_logprobs": 64, "enforce_eager": True}.
        env: environment variables of the server beside those of this process.
        timeout: seconds that it may take until it answers.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        *,
        python: str | None = None,
        port: int | None = None,
        options: Mapping[str, Any] | None = None,
        env: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.model, self.log, self.timeout = model, log, timeout
        self._env = {name: str(value) for name, value in (env or {}).items()}
        self._python, self._options = python or sys.executable, dict(options or {})
        self._port = port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the guard, by which other processes on this machine see whether the server `is_alive`."""
        assert self._process is not None
        return self._process.pid

    def command(self) -> list[str]:
        """The server's command line."""
        fixed = {"model": self.model, "host": "127.0.0.1", "port": self._port, "generation_config": "vllm"}
        flags = [part for name, value in {**fixed, **self._options}.items() for part in _flag(name, value)]
        return [self._python, "-m", "vllm.entrypoints.openai.api_server", *flags]

    def start(self) -> None:
        """Start the server, unless it is running."""
        if self.is_running:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", child_guard.__file__, *self.command()],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._environment(),
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._process)  # when nobody needs the server, and when Python ends

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            TeacherError: if it ends, or does not answer in time; with what its log says.
        """
        deadline = monotonic() + self.timeout
        while self.is_running and monotonic() < deadline:
            try:
                if httpx2.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx2.RequestError:
                pass
            sleep(_POLL)
        state = f"does not answer after {self.timeout:g} s" if self.is_running else "ended before it was ready"
        self.stop()
        raise TeacherError(f"the vLLM server that was started for this run {state}{self._reason()}: see {self.log}")

    def stop(self) -> None:
        """End the server and wait until it is gone."""
        if self._process is not None:
            _end(self._process)

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
        }
        return {
            "VLLM_NO_USAGE_STATS": "1",
            **inherited,
            "VLLM_SERVER_DEV_MODE": "1",  # routes that change weights
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            **self._env,
        }

    def _reason(self) -> str:
        """The last error in the log, in parentheses."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = [line.partition("] ")[2] or line for line in text[-_LAST:].splitlines()]
        errors = [line for line in lines if "rror: " in line]
        return f" ({errors[-1].strip()[:200].rstrip('.')})" if errors else ""


def is_alive(pid: int) -> bool:
    """Is there a process on this machine that has not ended?"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):  # the guard has ended, or was told before
        process.stdin.write(b".")  # closing alone says nothing while a forked child of this process has it open too
        process.stdin.close()
    process.wait()


def _flag(name: str, value: Any) -> list[str]:
    """max_logprobs=64 → --max-logprobs 64; a dictionary as JSON; true without a value."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
