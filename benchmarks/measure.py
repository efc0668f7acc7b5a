"""Time implementations side by side, and save the results; where there is a GPU, times and memory are the GPU's.

A machine's speed changes from minute to minute, so implementations take turns in one process, and what is
reported first is the ratio of each one's median to the first one's. Memory is what the operating system counts for a
process of its own.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "understudy")


class Stopwatch:
    """Wall-clock seconds, and CPU seconds of all threads of the process.

    On a busy machine compare the CPU seconds, of implementations with one thread each.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, call: Callable[[], T]) -> T:
        wait_for_gpu()
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        wait_for_gpu()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    def summary(self, base: "Stopwatch") -> dict[str, float]:
        """Ratios of the medians to those of `base`; median, least and most seconds."""
        median = statistics.median
        return {
            "ratio": median(self.wall) / median(base.wall),
            "cpu_ratio": median(self.cpu) / median(base.cpu),
            "median": median(self.wall),
            "min": min(self.wall),
            "max": max(self.wall),
            "cpu": median(self.cpu),
            "runs": len(self.wall),
        }


def alternate(implementations: dict[str, Callable[[], Any]], rounds: int = 3) -> dict[str, Stopwatch]:
    """Time every call in turn, `rounds` times; warm up before."""
    clocks = {name: Stopwatch() for name in implementations}
    for _ in range(rounds):
        for name, call in implementations.items():
            clocks[name].time(call)
    return clocks


def table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print rows as a table."""
    print(f"\n{title}")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print("  " + " ".join([" " * 34, *(f"{column:>13}" for column in columns)]))
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        print("  " + " ".join([f"{name:34}", *(f"{c:>13.3f}" if isinstance(c, float) else f"{c:>13}" for c in cells)]))
    sys.stdout.flush()


def wait_for_gpu() -> None:
    """A GPU works after the call that asked for it has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def save(name: str, content: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write results/NAME.json with the versions and the machine they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "versions": versions(), **content}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def processor() -> dict[str, Any]:
    """What torch knows of the processor: instruction sets as booleans, sizes of caches in bytes."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def has_bf16() -> bool:
    """Does the processor multiply in bfloat16 itself?"""
    return any(processor().get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def machine() -> dict[str, Any]:
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": sorted(name for name, value in processor().items() if value is True),
        "l2_cache_kib": processor().get("l2_cache_size", 0) // 2**10,
        "bf16_instructions": has_bf16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def peak_mb(work: Callable[[], Any]) -> float:
    """How much the memory of the GPU, or else of the process (Linux), grew at its highest while `work` ran, in MB."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _memory("VmRSS")
    work()
    return (_memory("VmHWM") - before) / 1024


def in_child(module: str, *args: str) -> dict[str, Any]:
    """Run `python -m benchmarks.MODULE ARGS` and parse the last line of its output as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *args], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(args)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _memory(field: str) -> int:
    [line] = [line for line in _lines("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1])


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
