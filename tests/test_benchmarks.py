"""`make bench-gpu`: a dry run on tiny shapes makes every table, and a machine without a GPU is told so."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from understudy.training import trainer

ROOT = Path(__file__).parent.parent
ABSENT = {"Liger": "liger_kernel", "TRL": "trl", "understudy, Triton": "triton"}


@pytest.fixture
def gpu(monkeypatch):
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(trainer, "compiles", trainer.compiles)  # benchmarks.step replaces it
    from benchmarks import gpu

    return gpu


def test_a_dry_run_measures_every_row_of_every_table(gpu, tmp_path, capsys):
    assert gpu.main(["--tiny", "--folder", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert saved["tiny"]
    titles = [title.partition(":")[0] for title in saved["tables"]]
    assert titles == ["loss"] * 3 + ["decoding", "step", "methods"]
    printed = capsys.readouterr().out
    for title, rows in saved["tables"].items():
        assert title in printed
        for name, row in rows.items():
            assert name in printed
            module = next((module for prefix, module in ABSENT.items() if name.startswith(prefix)), None)
            if module is not None and not find_spec(module):
                assert row == {"status": "not installed"}, name
            elif module is None:
                assert "status" not in row, (title, name, row)
                assert row["memory_mb"] >= 0
                assert max(row.get(unit, 0) for unit in ("ms", "seconds", "tokens/s")) > 0


def test_a_row_that_fails_says_so_and_fails_the_command(gpu, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel\nand more")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert gpu.attempt(out_of_memory) == {"status": "out of memory"}
    assert gpu.attempt(fail) == {"status": "failed: RuntimeError: no such kernel"}
    monkeypatch.setattr(gpu, "run", lambda *_: {"a table": {"TRL chunked": gpu.attempt(fail)}})
    assert gpu.main(["--tiny", "--folder", str(tmp_path)]) == 0
    monkeypatch.setattr(gpu, "run", lambda *_: {"a table": {"understudy": gpu.attempt(fail)}})
    assert gpu.main(["--tiny", "--folder", str(tmp_path)]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_is_refused_with_a_remedy(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA device here: `--tiny` is a dry run" in capsys.readouterr().err
