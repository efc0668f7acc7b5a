"""The loss, forward and backward, from hidden rows and heads: this package, TRL, Liger, and the matrix products alone.

What is timed: Σ over N rows of a divergence of two heads over V = 50,257 tokens, with the gradients by hidden rows and
by the student's head (widths 256 and 512), float32. The floor is the four matrix products, row-major, in tiles of the
same memory, and nothing between them. On a processor with bf16 instructions the products are also in bf16, with a floor
of their own (`bf16_ratio`). Compiling is not in the times; it is written down beside them.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from understudy import Divergence, ForwardKL, JensenShannon, ReverseKL, fused_divergence
from understudy.fused_linear.tiles import rows_per_tile, tiling

from .measure import Stopwatch, alternate, has_bf16, in_child, peak_mb, save, table

V, WIDTH, TEACHER_WIDTH = 50_257, 256, 512
DIVERGENCES: dict[str, tuple[float, Divergence]] = {  # and how TRL and Liger call it
    "forward KL": (0.0, ForwardKL()),
    "reverse KL": (1.0, ReverseKL()),
    "JSD(0.5)": (0.5, JensenShannon(0.5)),
}
FAST = ["understudy, compiled", "understudy", "Liger, compiled"]
SLOW = ["TRL chunked"]  # one call each
ALSO = ["Liger", "TRL plain"]  # with one of the divergences
FLOOR, BF16_FLOOR, BF16 = "floor: matrix products", "floor: bf16 products", "understudy, bf16 products"


class Task:
    """Random hidden rows and heads, the same for everybody; `options` are the dtype and the device."""

    def __init__(
        self, rows: int, vocabulary: int = V, width: int = WIDTH, teacher_width: int = TEACHER_WIDTH, **options: Any
    ) -> None:
        options["generator"] = torch.Generator(options.get("device", "cpu")).manual_seed(0)
        self.hidden = torch.randn(rows, width, **options).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, **options) * 0.05).requires_grad_()
        self.teacher_hidden = torch.randn(rows, teacher_width, **options)
        self.teacher_weight = torch.randn(vocabulary, teacher_width, **options) * 0.05

    def run(self, loss: Callable[["Task"], Tensor]) -> float:
        self.hidden.grad = self.weight.grad = None
        value = loss(self)
        value.backward()
        return float(value.detach())


def understudy_loss(divergence: Divergence, compiled: bool, task: Task, triton: bool = False) -> Tensor:
    with tiling(compiled=compiled, triton=triton):
        return fused_divergence(divergence, task.teacher_hidden, task.teacher_weight, task.hidden, task.weight)


def understudy_bf16(divergence: Divergence, task: Task) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return understudy_loss(divergence, True, task)


def liger(beta: float, compiled: bool, task: Task) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    labels = torch.zeros(len(task.hidden), dtype=torch.long, device=task.hidden.device)
    mean = loss(task.hidden, task.weight, task.teacher_hidden, task.teacher_weight, labels)
    return mean * len(task.hidden)


def trl_chunked(beta: float, task: Task) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows, _ = ChunkedDivergenceFunction.apply(
        task.hidden, task.weight, None, task.teacher_hidden, task.teacher_weight, None, beta
    )
    return rows.sum()


def trl_plain(beta: float, task: Task) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = task.teacher_hidden @ task.teacher_weight.t()
    student = task.hidden @ task.weight.t()
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")


def implementation(name: str, which: str) -> Callable[[Task], Tensor]:
    beta, divergence = DIVERGENCES[which]
    return {
        "understudy, compiled": partial(understudy_loss, divergence, True),
        "understudy": partial(understudy_loss, divergence, False),
        "understudy, Triton": partial(understudy_loss, divergence, False, triton=True),
        BF16: partial(understudy_bf16, divergence),
        "Liger, compiled": partial(liger, beta, True),
        "Liger": partial(liger, beta, False),
        "TRL chunked": partial(trl_chunked, beta),
        "TRL plain": partial(trl_plain, beta),
    }[name]


@torch.no_grad()
def floor(task: Task) -> None:
    """The four products alone."""
    rows = len(task.hidden)
    size = -(-rows // -(-rows // rows_per_tile(len(task.weight), task.weight.device)))
    student, teacher = torch.empty(2, size, len(task.weight), dtype=task.weight.dtype, device=task.weight.device)
    grad_hidden, grad_weight = torch.empty_like(task.hidden), torch.zeros_like(task.weight)
    for start in range(0, rows, size):
        tile = slice(start, start + size)
        count = len(task.hidden[tile])
        torch.mm(task.hidden[tile], task.weight.t(), out=student[:count])
        torch.mm(task.teacher_hidden[tile], task.teacher_weight.t(), out=teacher[:count])
        torch.mm(student[:count], task.weight, out=grad_hidden[tile])
        grad_weight.addmm_(student[:count].t(), task.hidden[tile])


def contestants(which: str) -> tuple[list[str], list[str]]:
    """The names of those that take turns, and of those that are called once."""
    fast, slow = list(FAST), SLOW + (ALSO if which == "JSD(0.5)" else [])
    if has_bf16():
        fast.append(BF16)
    elif which == "JSD(0.5)":
        slow.append(BF16)  # emulated, which is slow
    return fast, slow


def race(rows: int, which: str) -> dict[str, Any]:
    fast, slow = contestants(which)
    task = Task(rows)
    implementations: dict[str, Callable[[], Any]] = {FLOOR: partial(floor, task)}
    if has_bf16():
        implementations[BF16_FLOOR] = partial(floor, Task(rows, dtype=torch.bfloat16))
    for call in implementations.values():
        call()
    first, values = {}, {}
    for name in fast + slow:
        implementations[name] = partial(task.run, implementation(name, which))
    for name in fast:
        start = time.perf_counter()
        values[name] = implementations[name]()
        first[name] = time.perf_counter() - start
    clocks = alternate({name: call for name, call in implementations.items() if name not in slow})
    for name in slow:
        clocks[name] = Stopwatch()
        values[name] = clocks[name].time(implementations[name])
    result = {name: clock.summary(clocks[FLOOR]) for name, clock in clocks.items()}
    if has_bf16():
        result[BF16]["bf16_ratio"] = clocks[BF16].summary(clocks[BF16_FLOOR])["ratio"]
    for name, value in values.items():
        result[name]["value"] = value / rows
        if name in first:
            result[name]["first_call"] = first[name]
    return result


def memory(name: str, which: str, rows: int, vocabulary: int) -> float:
    """Peak resident memory beyond what was there before, in MB; compiled beforehand on fewer rows."""
    loss = implementation(name, which)
    if "compiled" in name:
        for few in (64, 600):
            Task(few, vocabulary).run(loss)
    task = Task(rows, vocabulary)
    return peak_mb(lambda: task.run(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=4, metavar=("NAME", "DIVERGENCE", "N", "V"))
    parser.add_argument("--rows", type=int, default=4096)
    args = parser.parse_args()
    if args.memory:
        name, which, rows, vocabulary = args.memory
        print(json.dumps({"peak_mb": memory(name, which, int(rows), int(vocabulary))}))
        return
    results: dict[str, Any] = {}
    for which in DIVERGENCES:
        title = f"{which}, N = {args.rows}"
        results[title] = race(args.rows, which)
        table(f"{title}, V = {V:,}: ratio to the floor, seconds", results[title])
        save("loss", {"times": results})
    peaks: dict[str, dict[str, float]] = {}
    for name in [*FAST, *SLOW, "TRL plain"]:
        which = "JSD(0.5)"
        sizes = [(args.rows, V)]
        if name == "understudy, compiled":
            sizes += [(args.rows // 4, V), (2 * args.rows, V), (args.rows, 2 * V)]
        for rows, vocabulary in sizes:
            row = in_child("loss", "--memory", name, which, str(rows), str(vocabulary))
            peaks[f"{name}, N = {rows}, V = {vocabulary}"] = row
    table("JSD(0.5): growth of the process's memory at its highest, MB", peaks)
    save("loss", {"times": results, "memory": peaks})


if __name__ == "__main__":
    main()
