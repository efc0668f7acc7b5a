"""Training on two processes equals training on one.

One start of torchrun (gloo, on the CPU) runs every case; the tests read what it left. The sizes are chosen so that
every epoch divides evenly: otherwise Accelerate gives the processes some examples twice to make their batches equal.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, writer
from loop import difference, logged, short_sampling, student, trainer, weights
from transformers import TrainerCallback

from understudy.batch import Batch, Example
from understudy.divergences import JensenShannon, ReverseKL
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.promptkd import PromptKD
from understudy.methods.seqkd import SeqKD
from understudy.methods.sft import SFT
from understudy.models.forward import score
from understudy.reward import Reward
from understudy.rollouts.generate import GenerateRollout
from understudy.step import Step
from understudy.teachers.local import LocalTeacher
from understudy.training.checkpoint import last_checkpoint
from understudy.training.signals import StopOnSignal

CASES = {
    "sft": lambda: SFT(),
    "kd": lambda: KD(reduction="sequence"),
    "gkd": lambda: GKD(),
    "gkd, mixed by step": lambda: GKD(on_policy=0.5, reduction="token"),
    "gkd, mixed by example": lambda: GKD(on_policy=0.5, mix="example"),
    "seqkd": lambda: SeqKD(),
    "promptkd": lambda: PromptKD(prompt_tokens=3, prompt_lr=1e-2, prompt_warmup=2),
    "dpkd": lambda: DPKD(),
    "dpkd that keeps responses": lambda: DPKD(refresh=3),
    "gkd with a reward": lambda: GKD(distillation=0.5, divergence=ReverseKL(), reward=Reward([short])),
}
NUMBERS = ("loss", "grad_norm", "forward_kl", "tokens", "response_length", "truncated", "eval_loss", "eval_tokens")
NUMBERS += ("reward", "eval_loss_on_policy", "eval_loss_dataset")
CORPUS = [Example([1], [4 + i, 5 + i % 7, 2], "corpus", row=i) for i in range(20)]
KEPT = "dpkd that keeps responses"


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


def train(folder, case, processes, resume=None, **changed):
    """Two epochs of two steps; eight examples per step, over all processes. In float64, because of Adam."""
    run = trainer(
        folder / "run",
        CASES[case](),
        student().double(),
        LocalTeacher(tiny("llama", width=24, seed=2).double()),
        None,
        short_sampling(stop_ids=[2, *range(5, 15)]),
        ragged_examples(16),
        options={"eval_dataset": ragged_examples(5, seed=4), "corpus": CORPUS},
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,  # one process has two batches, the other one
        **{"eval_strategy": "epoch", **changed},
    )
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return weights(run.model), {name: logged(run, name) for name in NUMBERS}


def train_to_the_third_step(folder, processes):
    """With a checkpoint in the middle of the second epoch."""
    return train(folder, KEPT, processes, save_strategy="steps", save_steps=3, eval_strategy="no")


def train_from(folder, checkpoint, processes):
    return train(folder, KEPT, processes, checkpoint / "run" / "checkpoint-3", eval_strategy="no")[0]


def train_experts(folder, processes):
    """Micro-batches of one example, for which alone the router's loss does not depend on the number of processes."""
    fields = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "vocab_size": VOCABULARY}
    run = trainer(
        folder / "experts",
        SFT(),
        families.model("mixtral", **fields),
        examples=ragged_examples(16),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8 // processes,
        optim="sgd",
    )
    run.train()
    return weights(run.model), {name: logged(run, name) for name in ("loss", "aux_loss")}


def train_for_seconds(folder):
    """A budget of five seconds, of which every step takes one by the first process's clock, two by the second's."""
    from understudy.budget import Budget
    from understudy.training import spending

    counts = itertools.count(0, 1 + int(os.environ["RANK"]))
    spending.perf_counter, clock = counts.__next__, spending.perf_counter
    try:
        run = trainer(
            folder / "run",
            SFT(),
            examples=ragged_examples(64),
            options={"budget": Budget(seconds=5.0)},
            max_steps=8,
            lr_scheduler_type="linear",
        )
        run.train()
    finally:
        spending.perf_counter = clock
    return {"steps": run.state.global_step, "seconds": run.spending.seconds, "rates": logged(run, "learning_rate")}


class Terminate(TrainerCallback):
    """SIGTERM reaches the second process alone, in its second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_by_a_signal(folder):
    with StopOnSignal() as stop:
        options = {"callbacks": [Terminate(), stop]}
        run = trainer(folder, SFT(), examples=ragged_examples(64), options=options, max_steps=6, save_strategy="steps")
        run.train()
    return {"steps": run.state.global_step, "signal": stop.signal, "saved": last_checkpoint(folder)}


SHARDED = Batch.from_examples(ragged_examples(6), 0)


def loss_and_gradients(model, gather):
    local = LocalTeacher(tiny("llama", width=24, seed=2))
    teacher_scores = local.score(SHARDED)
    divergence = JensenShannon()
    loss = score(
        model,
        SHARDED,
        lambda own: teacher_scores.divergence_to(own, divergence).sum(),
        weights=torch.ones(len(SHARDED.tokens)),
    )
    loss.backward()
    return {"loss": loss.detach(), **{name: gather(p.grad) for name, p in model.named_parameters()}}


def shard(tied):
    """A student whose layers and rest are sharded over both processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = student(tied=tied), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def write_sharded(rank):
    """Each process generates other rows; the second fewer and, at last, none."""
    model = shard(False)
    generate = writer(GenerateRollout, model, max_new_tokens=6, stop_ids=[2, *range(5, 15)], batch_size=2)
    examples = ragged_examples(8, responses=False)
    first = generate(examples[:5] if rank == 0 else examples[5:], Step(0))
    second = generate(examples[:2] if rank == 0 else [], Step(1))
    after = loss_and_gradients(model, lambda grad: grad.full_tensor())
    return [(e.row, e.response) for e in first + second], after


def worker(folder):
    """What each of two processes does."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for case in CASES:
        changed, numbers = train(folder, case, 2)
        torch.save(changed, folder / f"{case}-{rank}.pt")
        if rank == 0:
            (folder / f"{case}.json").write_text(json.dumps(numbers))
    train_to_the_third_step(folder / "two", 2)
    for processes in ("one", "two"):
        torch.save(train_from(folder / "resumed", folder / processes, 2), folder / f"from-{processes}-{rank}.pt")
    torch.save(train_experts(folder, 2), folder / f"experts-{rank}.pt")
    (folder / f"seconds-{rank}.json").write_text(json.dumps(train_for_seconds(folder)))
    (folder / f"signal-{rank}.json").write_text(json.dumps(stop_by_a_signal(folder / "signal")))
    for tied in (False, True):
        sharded = loss_and_gradients(shard(tied), lambda grad: grad.full_tensor())
        torch.save(sharded, folder / f"sharded-{tied}-{rank}.pt")
    torch.save(write_sharded(rank), folder / f"written-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train_to_the_third_step(folder / "one", 1)
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the address is given, not found: the name of a machine need not lead back to it
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *meeting, str(here), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case, results, tmp_path):
    single, numbers = train(tmp_path, case, 1)
    ranks = [torch.load(results / f"{case}-{rank}.pt") for rank in range(2)]
    assert difference(*ranks) == 0, "the processes have drifted apart"
    assert difference(single, ranks[0]) < (1e-6 if case == "promptkd" else 1e-10)  # a prompt is kept in float32
    assert difference(single, weights(student().double())) > 1e-3
    together = json.loads((results / f"{case}.json").read_text())
    for name in NUMBERS:
        assert together[name] == pytest.approx(numbers[name], rel=1e-5), name


@pytest.mark.parametrize("before", ["one", "two"])
@pytest.mark.parametrize("after", ["one", "two"])
def test_responses_that_are_kept_are_resumed_whatever_the_number_of_processes(before, after, results, tmp_path):
    uninterrupted, _ = train(tmp_path / "whole", KEPT, 1, eval_strategy="no")
    if after == "one":
        resumed = train_from(tmp_path / "part", results / before, 1)
    else:
        resumed = torch.load(results / f"from-{before}-0.pt")
        assert difference(resumed, torch.load(results / f"from-{before}-1.pt")) == 0
    assert difference(uninterrupted, resumed) < 1e-10


def test_the_router_s_loss_is_a_mean_over_the_positions_of_all_processes(results, tmp_path):
    single, numbers = train_experts(tmp_path, 1)
    (first, together), (second, _) = (torch.load(results / f"experts-{rank}.pt") for rank in range(2))
    assert difference(first, second) == 0
    assert difference(single, first) < 1e-5
    for name, values in numbers.items():
        assert together[name] == pytest.approx(values, rel=1e-5), name


def test_all_processes_end_at_the_step_that_uses_up_the_first_one_s_seconds(results):
    first, second = (json.loads((results / f"seconds-{rank}.json").read_text()) for rank in range(2))
    assert (first["steps"], first["seconds"]) == (second["steps"], second["seconds"]) == (5, 5.0)
    assert first["rates"] == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])  # the first process logs


def test_a_signal_to_one_process_ends_all_after_the_same_step_with_a_checkpoint(results):
    for rank in range(2):
        stopped = json.loads((results / f"signal-{rank}.json").read_text())
        assert (stopped["steps"], stopped["signal"]) == (2, signal.SIGTERM)
        assert stopped["saved"].endswith("checkpoint-2")


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_student_has_the_same_loss_and_gradients(tied, results):
    plain = loss_and_gradients(student(tied=tied), lambda grad: grad)
    for rank in range(2):
        sharded = torch.load(results / f"sharded-{tied}-{rank}.pt")
        assert difference(plain, sharded) < 1e-5


def test_a_sharded_student_generates_the_responses_of_an_unsharded_one(results):
    """Also where one process has fewer rows to write, shorter ones, or none."""
    generate = writer(GenerateRollout, student(), max_new_tokens=6, stop_ids=[2, *range(5, 15)])
    examples = ragged_examples(8, responses=False)
    plain = loss_and_gradients(student(), lambda grad: grad)
    for rank, (first, second) in enumerate([(examples[:5], examples[:2]), (examples[5:], [])]):
        expected = generate(first, Step(0)) + generate(second, Step(1))
        written, after = torch.load(results / f"written-{rank}.pt")
        assert written == [(e.row, e.response) for e in expected]
        assert difference(plain, after) < 1e-5, "it must be sharded again, and train"


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
