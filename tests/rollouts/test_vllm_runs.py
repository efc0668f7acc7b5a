"""Training with rollout vllm and a fake server: versions, faults, responses generated ahead, several processes."""

import gc
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import psutil
import pytest
import torch
import vllm_runs
from fake_engine import FakeVLLMEngine, interpreter
from loop import difference, logged, same, student, trainer, weights
from vllm_runs import CASES, run_of, started

from understudy.methods.gkd import GKD
from understudy.rollouts.vllm import VLLMRollout
from understudy.sampling import Schedule
from understudy.serving import student_engine
from understudy.teacher import TeacherError
from understudy.training.checkpoint import last_checkpoint

AHEAD = Schedule(ahead=1)


def served(kind, **options):
    """A server of others; with adapters it has been given the model below them."""
    server = FakeVLLMEngine(**options)
    if "lora" in kind:
        server.base = student(kind).unload()
    return server


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
    whole = run(tmp_path / "whole", served(kind), model=student(kind), schedule=AHEAD)
    server = served(kind, dies_after=13)
    again = run(tmp_path / "again", server, model=student(kind), schedule=AHEAD)
    assert server.dies_after is None, "it has died"
    assert logged(again, "weight_version") == [0, 0, 1, 2]
    assert same(weights(again.model), weights(whole.model))
    assert set(readers) == {"MainThread"}


def test_a_started_server_that_is_killed_is_started_again_and_none_is_left(tmp_path):
    interpreter(tmp_path)
    killed = run_of(tmp_path / "killed", "one", "killed", 1)
    killed.train()
    servers = started(tmp_path / "killed" / "vllm.log")
    assert len(servers) == 2
    assert servers[0]["arguments"] == servers[1]["arguments"]
    assert logged(killed, "weight_version") == [0, 1, 2, 3]
    alone = run_of(tmp_path / "alone", "one", "killed", 1, FakeVLLMEngine())
    alone.train()
    assert difference(weights(killed.model), weights(alone.model)) < 1e-6
    del killed
    gc.collect()
    assert not any(psutil.pid_exists(server["pid"]) for server in servers)


def torchrun(folder: Path, kind: str) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(vllm_runs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", str(port), vllm_runs.__file__, kind, str(folder)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_share_a_server_that_the_first_one_starts(kind, tmp_path):
    """Also ahead, when it is killed, sharded, and with adapters; they end with the weights of one process."""
    interpreter(tmp_path)
    results = torchrun(tmp_path, kind)
    for case in CASES[kind]:
        alone = run_of(tmp_path / "alone", "one", case, 1, served("llama+lora" if case == "adapters" else "llama"))
        alone.train()
        assert results[case]["versions"] == logged(alone, "weight_version")
        assert difference(results[case]["weights"], weights(alone.model)) < 1e-6
        assert results[case]["servers"] == (2 if case == "killed" else 1)
