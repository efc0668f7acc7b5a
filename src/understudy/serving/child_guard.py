"""Run a command, and end it with all that it started when standard input says so, or closes: the parent is gone.

A program of its own, run by its path: `python child_guard.py COMMAND …`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def run(command: list[str]) -> int:
    """The command's exit code."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # only the parent ends the command
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, restore_signals=True, preexec_fn=_default_signals
    )
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    _end_group(child)
    return code


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """End what a command has left behind; Python's resource tracker, which frees shared memory, ends last."""
    _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while _signal(child, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(child, signal.SIGKILL)


def _default_signals() -> None:
    """In the child: signals that are ignored would stay ignored there."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _end_with_input(child: "subprocess.Popen[bytes]") -> None:
    os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when the program ends
    child.terminate()  # it ends what it has started
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL)


def _signal(child: "subprocess.Popen[bytes]", number: int) -> bool:
    """Send a signal to the processes of the child's group, if there are any."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
