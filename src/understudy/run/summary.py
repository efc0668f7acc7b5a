"""The content of run.json: models, data, hardware, versions, costs and metrics of a run."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from ..training.trainer import StudentTrainer
    from .build import Run


def summarize(run: "Run", seconds: dict[str, float], metrics: dict[str, float]) -> dict[str, Any]:
    """The content of run.json.

    Args:
        seconds: `seconds` and `cpu_seconds` of training.
        metrics: of the trainer's last evaluation.
    """
    trainer = run.trainer
    model = trainer.accelerator.unwrap_model(trainer.model)
    teachers = [] if run.teacher is None else [part.local_model for part in run.teacher.parts().values()]
    sizes = [sum(p.numel() for p in teacher.parameters()) for teacher in teachers if teacher is not None]
    return {
        "recipe": run.recipe.name,
        "folder": str(run.folder.path),
        "steps": trainer.state.global_step,
        **{name: round(value, 2) for name, value in seconds.items()},
        "tokens": trainer.tokens_seen,
        "budget": _budget(trainer),
        "student_parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "teacher_parameters": sum(sizes) if sizes else None,
        "examples": len(run.train),
        "fingerprint": run.train.fingerprint,
        "cut_prompts": run.train.cut_prompts,
        "cut_responses": run.train.cut_responses,
        "skipped": run.train.skipped,
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "device": str(trainer.args.device) if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "peak_memory_mb": _peak_memory_mb(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "understudy": version("understudy"),
            "commit": _commit(),
        },
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }


def _budget(trainer: "StudentTrainer") -> dict[str, Any] | None:
    """The limit in `tokens` or `seconds`, the amount `spent`, and what ended the run (`ended_by`)."""
    spending, state = trainer.spending, trainer.state
    budget = spending.budget
    if budget is None:
        return None
    spent = spending.tokens if budget.kind == "tokens" else round(spending.seconds, 3)
    cause = "budget" if spending.share >= 1 else "max_steps" if state.global_step >= state.max_steps else "patience"
    return {budget.kind: budget.limit, "spent": spent, "ended_by": cause}


def _peak_memory_mb() -> float | None:
    """Peak memory of this process in MiB: on the GPU if there is one, else its resident set."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def _commit() -> str | None:
    """The commit of the checkout that this code lies in, if it is one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        process = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
