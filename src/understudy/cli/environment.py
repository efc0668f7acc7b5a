"""`understudy --version` and `understudy env`: versions, processor and accelerators, for bug reports."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy", "pydantic")


def print_version(is_asked: bool) -> None:
    """Print the version and end the command."""
    if is_asked:
        typer.echo(f"understudy {version('understudy')}")
        raise typer.Exit


def env() -> None:
    """Print versions, processor and accelerators, to paste into a bug report."""
    rows = {"understudy": _version("understudy"), "python": f"{platform.python_version()}, {sys.executable}"}
    rows |= {"platform": platform.platform(), **{name: _version(name) for name in _PACKAGES}}
    try:
        rows |= _torch()
    except (ImportError, OSError, RuntimeError) as error:
        rows["torch"] += f", which cannot be used: {error}"
    from ..terminal import show

    for name, value in rows.items():
        show(f"{name:14} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch() -> dict[str, str]:
    """What torch finds: instructions of the processor, threads, accelerators."""
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    instructions = [name for name, value in capabilities.items() if value is True]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "instructions": ", ".join(instructions) or "unknown",
        "accelerator": ", ".join(gpus) or str(accelerator or "none"),
        "cuda": str(torch.version.cuda or "none"),
    }
