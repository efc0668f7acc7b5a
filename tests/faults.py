"""A process that kills itself at a chosen file operation of a run, and then resumes the run.

    python tests/faults.py RECIPE FOLDER COUNT

runs the recipe once without a fault, then COUNT times with a SIGKILL, at operations spread over the whole run, and
resumes each. It prints a line of JSON for each: the operation, exit codes, and whether the results are the same. Runs
are forks of this process, which has loaded all modules, because loading takes longer than such a run.
"""

import json
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console

from understudy.recipe import load
from understudy.run.distill import distill

WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Killer:
    """Counts the operations that change files in a folder, and kills the process in the middle of number `at`."""

    def __init__(self, folder, at):
        self.folder, self.at, self.count = str(folder), at, 0
        sys.addaudithook(self.audit)
        torch.save = self.saving(torch.save, 1)
        safetensors.torch.serialize_file = self.saving(safetensors.torch.serialize_file, 1)

    def audit(self, event, args):
        if event in WRITES and self.folder in str(args[0]):
            reads = event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR))
            if not reads:
                self.operation()

    def saving(self, save, position):
        def wrapped(*args, **kwargs):
            result = save(*args, **kwargs)
            path = args[position]
            if str(path).startswith(self.folder):
                self.operation(lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return wrapped

    def operation(self, before_the_end=lambda: None):
        self.count += 1
        if self.count == self.at:
            before_the_end()
            os.kill(os.getpid(), signal.SIGKILL)


def run(recipe, folder, at=0):
    """Run or resume in a fork; returns the exit code, negative for a signal. Leaves the number of operations."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killer = Killer(folder, at)
            console = Console(quiet=True)
            distill(load(recipe, [f"training.output_dir={folder}"]), console=console)
            Path(f"{folder}.count").write_text(str(killer.count))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder):
    """What must be the same: the student, its log lines without times, the samples, and the names of all files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    losses = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    samples = (folder / "samples.jsonl").read_text()
    return (folder / "student" / "model.safetensors").read_bytes(), losses, samples, names


def main(recipe, home, count):
    whole = home / "whole"
    assert run(recipe, whole) == 0
    operations = int((home / "whole.count").read_text())
    expected = contents(whole)
    count = min(count, operations)
    for index in range(count):
        at = 1 + round(index * (operations - 1) / max(count - 1, 1))
        folder = home / f"killed-{at}"
        killed, resumed = run(recipe, folder, at), run(recipe, folder)
        same = resumed == 0 and contents(folder) == expected
        print(json.dumps({"operation": at, "of": operations, "killed": killed, "resumed": resumed, "same": same}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
