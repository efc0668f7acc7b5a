"""Run tasks of lm-evaluation-harness (EleutherAI) for a model by name or folder."""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..models.load import load_model, load_tokenizer
from ..registry import UnknownName, did_you_mean
from .evaluate import Evaluation


def run_tasks(model: str, tasks: Sequence[str], limit: int | None = None, batch_size: int | None = None) -> Evaluation:
    """Evaluate a model with lm_eval: its numbers as `<task>/<metric>`, with standard errors.

    Args:
        tasks: lm_eval's tasks, groups and tags by name (mmlu, bbh), or YAML files that describe further ones.
        limit: evaluate only the first `limit` rows of each task.

    Raises:
        ValueError: where lm_eval is not installed, and for an unknown task; before weights are loaded.
    """
    try:
        evaluator, models, manager = map(import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'understudy[lm-eval]'"
        ) from error
    index = manager.TaskManager()
    for task in tasks:
        if not Path(task).is_file() and not index.match_tasks([task]):
            hint = did_you_mean(task, index.all_tasks)
            raise UnknownName(f'lm-evaluation-harness has no task "{task}", nor is it a YAML file{hint}')
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded: Any = load_model(model, dtype="auto").to(device).eval()
    wrapped = models.HFLM(pretrained=loaded, tokenizer=load_tokenizer(model), batch_size=batch_size or 8)
    output: Any = evaluator.simple_evaluate(
        wrapped, tasks=list(tasks), limit=limit, task_manager=index, log_samples=False
    )
    numbers, signatures = {}, {}
    for task, results in output["results"].items():
        for name, value in results.items():
            measure, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered:
                label = measure if filtered == "none" else f"{measure} ({filtered})"
                numbers[f"{task}/{label}"] = float(value)
        shots = output.get("n-shot", {}).get(task)
        signatures[task] = f"version:{output['versions'].get(task)}|shots:{shots}|lm-eval:{version('lm-eval')}"
    return Evaluation([], numbers, signatures)
