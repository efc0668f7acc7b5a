"""The commands of docs/results.md for tasks that ship with the package run as they are written, in small sizes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "results.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
BY_THE_DEMO = "playground/{sft,kd,gkd}"  # the demo is this comparison, and has tests of its own
ON_THE_PLAYGROUND = [block for block in BLOCKS if "playground" in block and BY_THE_DEMO not in block]
FEW = (
    "training.max_steps=1",
    "training.eval_strategy=no",
    "training.eval_on_start=false",
    "evaluate.limit=2",
    "evaluate.exposure_bias=0",
)
SMALL = (
    (r"\{sft,kd,seqkd,gkd,(\w+),(\w+)\}", r"{seqkd,\1,\2}"),
    (r"--seeds \d+", "--seeds 1"),
    (r"--limit \d+", "--limit 4"),
    (r"--exposure-bias \d+", "--exposure-bias 2"),
    (r" --report\b", ""),
    (r"for t in [\d. ]+;", "for t in 1;"),
    (r"divergence=\*", "divergence=forward_kl"),
    (r'(--sweep "[^,"]*,[^,"]*),[^"]*"', r'\1"'),  # two values
    (r"(--sweep [^\s\",]*,[^\s\",]*),\S*", r"\1"),
    (r"^understudy compare ", f"understudy compare {' '.join(f'--set {x}' for x in FEW)} "),
)


def test_there_is_a_command_for_every_comparison_on_the_playground():
    assert len(ON_THE_PLAYGROUND) >= 5


@pytest.mark.parametrize("block", ON_THE_PLAYGROUND, ids=lambda block: block.split("\n")[0][:60])
def test_the_commands_of_the_results_run(block, tmp_path):
    for pattern, replacement in SMALL:
        block = re.sub(pattern, replacement, block, flags=re.MULTILINE)
    student = re.search(r"teacher\.local\.model=(\S+)", block)
    if student is not None:  # a student of an earlier command: here the one that it began with
        block = block.replace(student[1], "playground:arithmetic-student")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", block]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "accuracy" in result.stdout
