"""A run that is killed at any file operation resumes to the same student, log and files.

FAULTS is the number of operations at which it is killed, spread over the run; FAULTS=1000 is all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import described, llama, sums, write

SCRIPT = Path(__file__).parents[1] / "faults.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks of a process")
def test_a_run_killed_at_any_file_operation_resumes_to_the_bit(tmp_path):
    llama(tmp_path / "teacher")
    sums(tmp_path / "sums.jsonl")
    look = {"dataset": str(tmp_path / "sums.jsonl"), "split": "train", "limit": 2, "show": 1, "show_every": 1}
    content = described(tmp_path, method={"seqkd": {"soft_weight": 0.5}}, evaluate=look)
    content["training"] |= {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    recipe = write(tmp_path / "mine.yaml", content)
    count = os.environ.get("FAULTS", "4")
    command = [sys.executable, str(SCRIPT), str(recipe), str(tmp_path), count]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    faults = [json.loads(line) for line in result.stdout.splitlines()]
    assert faults
    wrong = [fault for fault in faults if (fault["killed"], fault["resumed"], fault["same"]) != (-9, 0, True)]
    assert not wrong, (wrong, result.stderr[-2000:])
