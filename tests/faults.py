"""A process that kills itself at a chosen file operation of a run, and then resumes the run.

    python tests/faults.py RECIPE FOLDER COUNT [AUTHOR]…

runs the recipe, or writes a cache of scores of each author's responses: once without a fault, then COUNT times with a
SIGKILL, at operations spread over the whole run, each of which is then resumed. It prints a line of JSON for each: the
operation, exit codes, whether the results are the same, and the names of the files that were left. Runs are forks of
this process, which has loaded all modules, because loading takes longer than such a run.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console

from understudy.recipe import load
from understudy.run.cache import CacheSettings, cache
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


def train(recipe, folder):
    distill(load(recipe, [f"training.output_dir={folder}"]), console=Console(quiet=True))


def write_cache(recipe, folder, author):
    cache(load(recipe), folder, CacheSettings(top_k=5, responses=author, batch_size=4, shard_mb=0.001))


def run(work, folder, at=0):
    """Run or resume in a fork; returns the exit code, negative for a signal. Leaves the number of operations."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killer = Killer(folder, at)
            work(folder)
            Path(f"{folder}.count").write_text(str(killer.count))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents_of_cache(folder):
    """Every file but the locks, which are empty."""
    return {name: (folder / name).read_bytes() for name in names_in(folder) if (folder / name).is_file()}


def contents(folder):
    """What must be the same: the student, its log lines without times, the samples, and the names of all files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    losses = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    samples = (folder / "samples.jsonl").read_text()
    return (folder / "student" / "model.safetensors").read_bytes(), losses, samples, names_in(folder)


def main(recipe, home, count, author=None):
    work = partial(train, recipe) if author is None else partial(write_cache, recipe, author=author)
    read = contents if author is None else contents_of_cache
    whole = home / "whole"
    home.mkdir(exist_ok=True)
    assert run(work, whole) == 0
    operations = int((home / "whole.count").read_text())
    expected = read(whole)
    count = min(count, operations)
    for index in range(count):
        at = 1 + round(index * (operations - 1) / max(count - 1, 1))
        folder = home / f"killed-{at}"
        killed, left = run(work, folder, at), names_in(folder)
        resumed = run(work, folder)
        same = resumed == 0 and read(folder) == expected
        codes = {"author": author, "operation": at, "of": operations, "killed": killed, "resumed": resumed}
        print(json.dumps({**codes, "same": same, "left": left}))


if __name__ == "__main__":
    recipe, home, count, *authors = sys.argv[1:]
    for author in authors or [None]:
        main(recipe, Path(home) / (author or "run"), int(count), author)
