"""Training with rollout vllm and a fake server: versions, faults, responses generated ahead, several processes."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
import vllm_runs
from fake_engine import FakeVLLMEngine, interpreter, served
from loop import difference, logged, same, student, trainer, weights
from sharded_runs import whole_weights
from vllm_runs import run_of, started

from understudy.methods.gkd import GKD
from understudy.rollouts.vllm import VLLMRollout
from understudy.sampling import Schedule
from understudy.serving import student_engine
from understudy.teacher import TeacherError
from understudy.training.checkpoint import last_checkpoint

AHEAD = Schedule(ahead=1)
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: pip install .[deepspeed]")


def server_for(kind, **options):
    """A server of others; with adapters it has been given the model below them."""
    base = student("llama+lora").unload() if kind in ("llama+lora", "adapters") else None
    return FakeVLLMEngine(**options, base=base)


def run(folder, server, resume=False, model=None, schedule=None):
    transport = httpx2.MockTransport(server)
    rollout = VLLMRollout(url="http://vllm:8000", _transport=transport, wait=0.05)
    made = trainer(folder, GKD(on_policy=1.0), model or student(), None, rollout, options={"schedule": schedule})
    made.train(resume_from_checkpoint=resume)
    return made


class Gone(FakeVLLMEngine):
    """Stays away from a request for responses on."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def complete(self, content):
        return httpx2.Response(503) if len(self.asked) >= self.after else super().complete(content)


@pytest.mark.parametrize(("schedule", "versions"), [(None, [0, 1, 2, 3]), (AHEAD, [0, 0, 1, 2])])
def test_weights_move_every_step_and_a_server_that_stays_away_ends_the_run_with_a_checkpoint(
    schedule, versions, tmp_path
):
    whole = run(tmp_path / "whole", FakeVLLMEngine(), schedule=schedule)
    assert logged(whole, "weight_version") == versions
    with pytest.raises(TeacherError, match=r"does not answer.*; stopped after step 2, and the same command resumes"):
        # two responses to compare and four to train on, twice; after the second step ahead there are eight to train on
        run(tmp_path / "gone", Gone(14 if schedule is None else 18), schedule=schedule)
    assert last_checkpoint(tmp_path / "gone") == str(tmp_path / "gone" / "checkpoint-2")
    resumed = run(tmp_path / "gone", FakeVLLMEngine(), resume=True, schedule=schedule)
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "weight_version") == versions
    assert same(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["llama", "llama+lora"])
def test_ahead_the_student_is_not_read_while_it_is_trained(kind, tmp_path, monkeypatch):
    """And a server that is started again while the thread generates has the weights of the step before."""
    readers = []
    for name in ("model_weights", "adapter_weights"):
        read = getattr(student_engine, name)
        monkeypatch.setattr(
            student_engine, name, lambda m, read=read: readers.append(threading.current_thread().name) or read(m)
        )
    whole = run(tmp_path / "whole", server_for(kind), model=student(kind), schedule=AHEAD)
    server = server_for(kind, dies_after=13)
    again = run(tmp_path / "again", server, model=student(kind), schedule=AHEAD)
    assert server.dies_after is None, "it has died"
    assert logged(again, "weight_version") == [0, 0, 1, 2]
    assert same(weights(again.model), weights(whole.model))
    assert set(readers) == {"MainThread"}


def torchrun(kind: str, folder: Path, url: str = "") -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(vllm_runs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", str(port), vllm_runs.__file__, kind, str(folder), url),
        ],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


def check(results: dict[str, Any], folder: Path) -> None:
    """The runs end with the weights of the same run of one process."""
    for case, result in results.items():
        alone = run_of(folder / "alone", "one", case, 1, transport=httpx2.MockTransport(server_for(case)))
        alone.train()
        assert result["versions"] == logged(alone, "weight_version"), case
        assert difference(result["weights"], whole_weights(alone)) < 1e-6, case


@pytest.mark.slow
def test_two_processes_share_a_server_that_is_started_again_when_it_is_killed_and_none_is_left(tmp_path):
    """While its responses are generated ahead."""
    interpreter(tmp_path)
    results = torchrun("ddp", tmp_path)
    servers = started(tmp_path / "ahead, killed" / "vllm.log")
    assert len(servers) == 2
    assert servers[0]["arguments"] == servers[1]["arguments"]
    assert not any(psutil.pid_exists(server["pid"]) for server in servers)
    check(results, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_a_sharded_student_is_gathered_for_a_server_of_others(kind, tmp_path):
    with served(server_for("adapters")) as url:
        check(torchrun(kind, tmp_path, url), tmp_path)
