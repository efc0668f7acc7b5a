"""Two processes with FSDP2, ZeRO-2 or ZeRO-3 end with the weights of one process; a killed run resumes to the bit.

One start of torchrun (gloo, on the CPU) trains every case of `sharded_runs` and is then killed; a second one resumes.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_runs
import torch
from fakes import ragged_examples, tiny, words
from loop import arguments, difference, student, weights
from sharded_runs import CASES, KINDS

from understudy.methods.sft import SFT
from understudy.models.sharding import shard_layers
from understudy.teachers.local import LocalTeacher
from understudy.teachers.routed import RoutedTeacher
from understudy.training.sharding import check_sharding
from understudy.training.trainer import StudentTrainer

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: pip install .[deepspeed]")
SHARDED = [pytest.param(k, marks=[NEEDS_DEEPSPEED] if "zero" in k else []) for k in KINDS if k != "one"]
TOLERANCE = 1e-6  # of weights of size 0.3 after four steps of size 1e-2; measured: 3e-7


def start(kind: str, action: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    script = Path(sharded_runs.__file__)
    path = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *meeting, str(script)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *command, kind, action, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {case: sharded_runs.train(folder, "one", case, 1) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_processes_train_as_one_does_and_a_killed_run_resumes_to_the_bit(kind, one_process, tmp_path):
    killed = start(kind, "train", tmp_path)
    assert "SIGKILL" in killed.stderr, killed.stderr[-4000:]
    sharded = {case: torch.load(tmp_path / f"{kind}, {case}.pt") for case in CASES}
    for case, single in one_process.items():
        assert difference(single["weights"], sharded[case]["weights"]) < TOLERANCE, case
        for name, values in single["numbers"].items():
            assert sharded[case]["numbers"][name] == pytest.approx(values, rel=1e-5), (case, name)
        if kind != "zero2":  # which shards gradients and optimizer state alone
            assert sharded[case]["kept"] < 0.65 * single["kept"], "every process holds about half of the weights"
    assert difference(sharded["sft"]["weights"], weights(student())) > 1e-3
    resumed = start(kind, "resume", tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    again = torch.load(tmp_path / f"{kind}, resumed.pt")["weights"]
    assert difference(sharded["promptkd"]["weights"], again) == 0
    if kind == "fsdp":
        elsewhere = start(kind, "resume-elsewhere", tmp_path, processes=4)
        assert elsewhere.returncode == 0, elsewhere.stderr[-4000:]
        again = torch.load(tmp_path / "fsdp, resumed elsewhere.pt")["weights"]
        assert difference(sharded["promptkd"]["weights"], again) < TOLERANCE


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each would train alone"):
        check_sharding(SimpleNamespace(world_size=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"version": 1}, "which is FSDP2"), ({"cpu_ram_efficient_loading": True}, "without weights in all processes")],
)
def test_settings_of_fsdp_that_would_break_are_refused(config, message):
    args = SimpleNamespace(world_size=1, fsdp=True, fsdp_config=config, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        check_sharding(args)


def test_what_a_deepspeed_configuration_leaves_out_is_as_the_arguments_say():
    def checked(**config):
        plugin = SimpleNamespace(deepspeed_config=config)
        values = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
        args = SimpleNamespace(fsdp=False, deepspeed_plugin=plugin, device=torch.device("cuda"), bf16=True, fp16=False)
        check_sharding(SimpleNamespace(world_size=1, **vars(args), **values))
        return config

    config = checked(zero_optimization={"stage": 3})
    assert config["gradient_clipping"] == 0.5
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 4)
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    with pytest.raises(ValueError, match="set optim"):
        checked(optimizer={"type": "AdamW"})


def test_a_teacher_is_sharded_over_several_processes_only():
    with pytest.raises(ValueError, match="there is one process, and nothing to shard over"):
        shard_layers(tiny("llama"), torch.device("cpu"))
    with pytest.raises(ValueError, match="leave device and quantization out"):
        LocalTeacher(tiny("llama"), shard=True, device="cuda:1")
    with pytest.raises(ValueError, match="would block the others: leave shard out"):
        RoutedTeacher({"a": LocalTeacher(tiny("llama"), shard=True)}, by="kind")


def test_a_student_that_is_sharded_already_is_refused(tmp_path):
    model = student()
    model.lm_head.weight.ds_id = 0  # as DeepSpeed marks a parameter that it has sharded
    with pytest.raises(ValueError, match="the student's weights are sharded already"):
        StudentTrainer(
            model, None, SFT(), processing_class=words(), args=arguments(tmp_path), train_dataset=ragged_examples(4)
        )
