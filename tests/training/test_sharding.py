"""Two processes with FSDP2, ZeRO-2 or ZeRO-3 end with the weights of one process; a killed run resumes to the bit.

One start of torchrun (gloo, on the CPU) trains every case of `sharded_runs`, runs a recipe to its end, and is killed in
the same recipe's third step; the command line then resumes.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_runs
import torch
from fakes import ragged_examples, tiny, words
from folders import write
from loop import arguments, difference, student, weights
from safetensors.torch import load_file
from sharded_runs import CASES, KINDS

from understudy.methods.sft import SFT
from understudy.models.sharding import shard_layers
from understudy.recipe import parse
from understudy.run.distill import distill
from understudy.teachers.local import LocalTeacher
from understudy.teachers.mixture import MixtureTeacher
from understudy.teachers.routed import RoutedTeacher
from understudy.teachers.student import StudentTeacher
from understudy.training.sharding import check_followed, check_sharding, converted
from understudy.training.trainer import StudentTrainer

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: pip install .[deepspeed]")
SHARDED = [pytest.param(k, marks=[NEEDS_DEEPSPEED] if "zero" in k else []) for k in KINDS if k != "one"]
TOLERANCE = 1e-6  # of weights of size 0.3 after four steps of size 1e-2; measured: 3e-7


def command(program: list[str], address: str, port: int, *options: str) -> list[str]:
    meeting = ["--master_addr", address, "--master_port", str(port), *options]
    return [sys.executable, "-m", "torch.distributed.run", *meeting, *program]


def environment(interface: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sharded_runs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": interface}
    return {**os.environ, **own, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})}


def start(*program: str, processes: int = 2) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        command(list(program), "127.0.0.1", port, "--nproc_per_node", str(processes)),
        env=environment("lo"),
        capture_output=True,
        text=True,
        timeout=580,  # DeepSpeed compiles its optimizer for the CPU once
        check=False,
    )


def start_cases(kind: str, action: str, folder: Path, processes: int = 2, **options) -> subprocess.CompletedProcess:
    return start(sharded_runs.__file__, kind, action, str(folder), json.dumps(options), processes=processes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    sharded_runs.prepare(folder)
    distill(parse(sharded_runs.merging(folder, "one", 1)))
    results = {case: sharded_runs.train(folder, "one", case, 1) for case in CASES}
    return SimpleNamespace(cases=results, merged=load_file(folder / "one, merged" / "student" / "model.safetensors"))


@pytest.fixture(scope="module", params=SHARDED)
def two_processes(request, tmp_path_factory):
    """The folder of the runs of one kind with two processes, of which the last was killed."""
    folder = tmp_path_factory.mktemp("two")
    sharded_runs.prepare(folder)
    killed = start_cases(request.param, "train, merge and be killed", folder)
    assert "SIGKILL" in killed.stderr, killed.stderr[-4000:]
    return request.param, folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_processes_train_as_one_does(two_processes, one_process):
    kind, folder = two_processes
    sharded = {case: torch.load(folder / f"{kind}, {case}.pt") for case in sharded_runs.cases_of(kind)}
    for case, result in sharded.items():
        single = one_process.cases[case]
        assert difference(single["weights"], result["weights"]) < TOLERANCE, case
        for name, values in single["numbers"].items():
            assert result["numbers"][name] == pytest.approx(values, rel=1e-5), (case, name)
        if kind != "zero2":  # which shards gradients and optimizer state alone
            assert result["kept"] < 0.65 * single["kept"], "every process holds about half of the weights"
    assert difference(sharded["sft"]["weights"], weights(student())) > 1e-3
    merged = load_file(folder / f"{kind}, merged" / "student" / "model.safetensors")
    assert difference(one_process.merged, merged) < TOLERANCE
    assert difference(merged, load_file(folder / "student" / "model.safetensors")) > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sharded_run_resumes_to_the_bit(two_processes):
    """By the command line; under FSDP2 and ZeRO-2 with another number of processes as well, up to rounding."""
    kind, folder = two_processes
    assert (folder / "killed" / "checkpoint-2").is_dir()
    assert not (folder / "killed" / "run.json").exists()
    shutil.copytree(folder / "killed", folder / "elsewhere")
    expected = load_file(folder / "whole" / "student" / "model.safetensors")

    def resumed(run: str, processes: int, *options: str) -> dict[str, torch.Tensor]:
        recipe = write(folder / f"{run}.yaml", sharded_runs.recipe_of(folder, kind, run))
        done = start("-m", "understudy", "distill", str(recipe), *options, processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        return load_file(folder / run / "student" / "model.safetensors")

    assert difference(expected, resumed("killed", 2)) == 0
    if kind != "zero3":
        options = ("--accept-changes", "training.per_device_train_batch_size=1")
        assert difference(expected, resumed("elsewhere", 4, *options)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", SHARDED)
def test_two_gpus_train_as_one_does(kind, bf16, tmp_path):
    """Not run yet. With bf16, whose rounding changes sampled responses, only by the methods without any."""
    for each, processes in (("one", 1), (kind, 2)):
        done = start_cases(each, "train", tmp_path, processes, use_cpu=False, bf16=bf16)
        assert done.returncode == 0, done.stderr[-4000:]
    start_of = weights(student())
    for case in sharded_runs.cases_of(kind):
        if bf16 and not case.startswith(("sft", "kd")):
            continue
        one, two = (torch.load(tmp_path / f"{each}, {case}.pt")["weights"] for each in ("one", kind))
        if not bf16:
            assert difference(one, two) < 10 * TOLERANCE, case
        else:
            moved = sum(float((one[name] - start_of[name]).square().sum()) for name in one)
            assert sum(float((one[name] - two[name]).square().sum()) for name in one) < 0.01 * moved, case


@pytest.fixture
def two_hosts():
    """Two network namespaces that are connected, by name and interface."""
    names = [f"understudy-{os.getpid()}-{host}" for host in "ab"]
    interfaces = [f"us{os.getpid() % 100000}{host}" for host in "ab"]
    link = ["link", "add", interfaces[0], "netns", names[0], "type", "veth", "peer", "name", interfaces[1]]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(*link, "netns", names[1])
        for host, (name, interface) in enumerate(zip(names, interfaces, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        yield list(zip(names, interfaces, strict=True))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and ip: {error}")
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("two_processes", ["fsdp"], indirect=True)
def test_two_hosts_train_as_one_host_does(two_processes, two_hosts, tmp_path):
    """Two network namespaces with a process each, and one host with two processes."""
    _, one = two_processes
    nodes = []
    for rank, (name, interface) in enumerate(two_hosts):
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        program = [sharded_runs.__file__, "fsdp", "gkd", str(tmp_path)]
        line = ["ip", "netns", "exec", name, *command(program, "10.77.0.1", 29500, *options)]
        nodes.append(subprocess.Popen(line, env=environment(interface), stderr=subprocess.PIPE, text=True))
    try:
        for node in nodes:
            _, errors = node.communicate(timeout=280)
            assert node.returncode == 0, errors[-4000:]
    finally:
        for node in nodes:
            node.kill()
    results = [torch.load(folder / "fsdp, gkd, tied embeddings.pt")["weights"] for folder in (one, tmp_path)]
    assert difference(*results) == 0


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each would train alone"):
        check_sharding(SimpleNamespace(world_size=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 1}, "which is FSDP2"),
        ({"cpu_ram_efficient_loading": True}, "without weights in all processes"),
        ({"cpu_offload": True}, "or use deepspeed with zero_optimization.offload_optimizer"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "would save student/ without weights: set FULL_STATE_DICT"),
        ({"offload_params": True}, "FSDP2 does not read fsdp_config.offload_params: leave it out"),
        ({"reshard_after": True}, 'leave it out; did you mean "reshard_after_forward"'),
    ],
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


@pytest.mark.parametrize("sharding", [{"fsdp": True}, {"deepspeed_plugin": True}])
@pytest.mark.parametrize("weights", ["average", "current"])
def test_a_teacher_that_follows_a_sharded_student_is_refused_before_training(weights, sharding):
    args = SimpleNamespace(**{"fsdp": False, "deepspeed_plugin": None, **sharding})
    with pytest.raises(ValueError, match="use weights: start"):
        check_followed(MixtureTeacher({"a": StudentTeacher(weights=weights), "b": StudentTeacher()}), args)
    check_followed(StudentTeacher(weights="start"), args)
    check_followed(StudentTeacher(weights=weights), SimpleNamespace(fsdp=False, deepspeed_plugin=None))


def test_a_teacher_is_sharded_over_several_processes_only():
    with pytest.raises(ValueError, match="there is one process, and nothing to shard over"):
        shard_layers(tiny("llama"), torch.device("cpu"))
    with pytest.raises(ValueError, match="leave device and quantization out"):
        LocalTeacher(tiny("llama"), shard=True, device="cuda:1")
    with pytest.raises(ValueError, match="would block the others: leave shard out"):
        RoutedTeacher({"a": LocalTeacher(tiny("llama"), shard=True)}, by="kind")


def test_a_checkpoint_of_zero3_is_resumed_by_as_many_processes_only(tmp_path):
    (tmp_path / "latest").write_text("global_step3")
    (tmp_path / "global_step3").mkdir()
    for rank in range(2):
        (tmp_path / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert not converted(tmp_path, processes=2, stage=3)
    with pytest.raises(ValueError, match="saved by 2 processes, and ZeRO-3 cannot resume it with 4: start 2 processes"):
        converted(tmp_path, processes=4, stage=3)
    (tmp_path / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match="start 2 processes"):
        converted(tmp_path, processes=4, stage=2)


def test_a_student_that_is_sharded_already_is_refused(tmp_path):
    model = student()
    model.lm_head.weight.ds_id = 0  # as DeepSpeed marks a parameter that it has sharded
    with pytest.raises(ValueError, match="the student's weights are sharded already"):
        StudentTrainer(
            model, None, SFT(), processing_class=words(), args=arguments(tmp_path), train_dataset=ragged_examples(4)
        )
