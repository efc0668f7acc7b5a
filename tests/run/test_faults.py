"""A run, or a cache of scores, that is killed at any file operation resumes to the same results and files.

FAULTS is the number of operations at which each is killed, spread over the run; FAULTS=1000 is all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import described, jsonl, llama, sums, write

SCRIPT = Path(__file__).parents[1] / "faults.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks of a process")
def test_a_run_killed_at_any_file_operation_resumes_to_the_bit(tmp_path):
    llama(tmp_path / "teacher")
    sums(tmp_path / "sums.jsonl")
    look = {"dataset": str(tmp_path / "sums.jsonl"), "split": "train", "limit": 2, "show": 1, "show_every": 1}
    content = described(tmp_path, method={"seqkd": {"soft_weight": 0.5}}, evaluate=look)
    content["training"] |= {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    recipe = write(tmp_path / "mine.yaml", content)
    all_resume(recipe, tmp_path, os.environ.get("FAULTS", "4"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks of a process")
def test_a_cache_killed_at_any_file_operation_resumes_to_the_same_bytes(tmp_path):
    """While responses of student and teacher are generated, and while they are scored: ten places in all."""
    llama(tmp_path / "teacher")
    jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i}+3="} for i in range(6)])
    rollout = {"generate": {"max_new_tokens": 8, "n": 2, "batch_size": 2}}
    recipe = write(tmp_path / "mine.yaml", described(tmp_path, method="kd", rollout=rollout))
    faults = all_resume(recipe, tmp_path, os.environ.get("FAULTS", "5"), "student", "teacher")
    for author in ("student", "teacher"):
        left = [fault["left"] for fault in faults if fault["author"] == author]
        has_scores = [any(name.startswith("scores-") for name in names) for names in left]
        assert any(has_scores)
        assert any("responses.jsonl" in names and not has for names, has in zip(left, has_scores, strict=True))


def all_resume(recipe, home, count, *authors):
    """Kill at `count` operations, check that the results are the same, and return what is printed about each."""
    command = [sys.executable, str(SCRIPT), str(recipe), str(home), count, *authors]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    faults = [json.loads(line) for line in result.stdout.splitlines()]
    assert faults
    wrong = [fault for fault in faults if (fault["killed"], fault["resumed"], fault["same"]) != (-9, 0, True)]
    assert not wrong, (wrong, result.stderr[-2000:])
    return faults
