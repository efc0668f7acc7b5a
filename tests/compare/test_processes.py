"""Runs of a comparison in processes of their own: they end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from understudy.compare import processes
from understudy.compare.processes import run_in_processes

SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from rich.console import Console
from understudy.compare import processes
from understudy.compare.processes import run_in_processes

@dataclass(frozen=True)
class Sleep:
    folder: Path
    name: str

    def __call__(self):
        def end(number, frame):
            time.sleep(0.3)  # as if it saved a checkpoint
            (self.folder / f"{self.name}.saved").write_text(str(number))
            sys.exit(0)

        signal.signal(signal.SIGTERM, end)
        (self.folder / f"{self.name}.partial").write_text(str(os.getpid()))
        (self.folder / f"{self.name}.partial").rename(self.folder / f"{self.name}.pid")
        time.sleep(120)

    def progress(self):
        return 0.0

    def error(self):
        return None

if __name__ == "__main__":
    processes._PRELOADED.clear()  # these tasks need none of it
    run_in_processes([Sleep(Path(sys.argv[1]), f"task{i}") for i in range(3)], 2, Console())
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        pass
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_runs_end_with_the_command_that_started_them(name, tmp_path):
    """After SIGTERM and SIGHUP each saves a checkpoint; nobody can be asked after SIGKILL."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stdout=subprocess.PIPE, text=True)
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    command.send_signal(getattr(signal, name))
    output, _ = command.communicate(timeout=60)
    assert command.returncode == -getattr(signal, name)
    until(lambda: not any(map(is_alive, pids)), seconds=10)
    saved = [int(path.read_text()) for path in tmp_path.glob("*.saved")]
    assert saved == ([] if name == "SIGKILL" else [signal.SIGTERM] * 2)
    assert ("ending 2 runs after a checkpoint" in output) == (name != "SIGKILL")
    assert len(list(tmp_path.glob("*.pid"))) == 2, "the third was never started"


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows cannot hold signals back")
def test_an_interrupt_waits_until_a_process_has_left_the_terminal():
    started = []

    def start():
        with processes._interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            started.append("a process")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    before = signal.getsignal(signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as a process that was started in the block has it
    signal.raise_signal(signal.SIGINT)
    processes._drop_interrupts()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_bar_moves_with_the_shares_of_running_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", -1.0)
    console = Console(file=(tmp_path / "out.txt").open("w"), width=80, force_terminal=True)
    task = SimpleNamespace(name="kd, seed 0", progress=lambda: 0.25, error=lambda: None)
    with processes._Display(2, console) as display:
        display.show_running([task, task])
        assert display._bar.tasks[0].completed == 0.5
        display.show_ended(task)
        display.show_running([task])
        assert display._bar.tasks[0].completed == 1.25


def test_without_a_terminal_each_run_that_ends_is_a_line(tmp_path, monkeypatch):
    class Failing:
        name = "kd, seed 0"

        def error(self):
            return "the disk is full\x1b[2J"

    class Process:
        def __init__(self, **_):
            pass

        def start(self):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr("understudy.compare.processes._context", lambda: type("", (), {"Process": Process}))
    console = Console(file=(tmp_path / "out.txt").open("w+"), width=80)
    run_in_processes([Failing(), Failing()], 1, console)
    console.file.seek(0)
    lines = console.file.read().splitlines()
    assert lines[0] == "kd, seed 0 failed: the disk is full\N{REPLACEMENT CHARACTER}[2J"
    assert lines[1] == "1 of 2 ended after 0:00:00, about 0:00:00 left: kd, seed 0"
    assert lines[3].startswith("2 of 2 ended")
    assert all(len(line) <= 80 for line in lines)
