"""Benchmarks: a dry run of `make bench-gpu`, what `make bench` measures on which processor, and the tables of docs."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from understudy.training import trainer

ROOT = Path(__file__).parent.parent
ABSENT = {"Liger": "liger_kernel", "TRL": "trl", "understudy, Triton": "triton"}


@pytest.fixture
def importable(monkeypatch):
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def gpu(importable, monkeypatch):
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


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_products_have_their_own_floor_where_the_processor_has_instructions_for_them(
    bf16, importable, monkeypatch
):
    from benchmarks import loss, tables

    monkeypatch.setattr(loss, "V", 40)
    monkeypatch.setattr(loss.Task.__init__, "__defaults__", (40, 8, 16))
    monkeypatch.setattr(loss, "has_bf16", lambda: bf16)
    monkeypatch.setattr(loss, "implementation", lambda name, which: lambda task: task.hidden.sum())
    times = {f"{which}, N = 4096": loss.race(6, which) for which in loss.DIVERGENCES}
    for which, rows in zip(loss.DIVERGENCES, times.values(), strict=True):
        assert (loss.BF16_FLOOR in rows) == bf16
        assert (loss.BF16 in rows) == (bf16 or which == "JSD(0.5)")
    aims = [aim.row({"loss": {"times": times}}) for aim in tables.AIMS if "bf16" in aim.text]
    for (_, _, measured, verdict), rows in zip(aims, times.values(), strict=True):
        if bf16:
            assert measured == f"{rows[loss.BF16]['bf16_ratio']:.2f}"
        else:
            assert (measured, verdict) == ("", "not measured: no bf16 instructions here")


def test_the_tables_of_docs_are_those_of_the_measurements(importable):
    from benchmarks import tables

    pages = {page: (ROOT / page).read_text("utf-8") for page in tables.PAGES}
    assert sum(page.count("<!-- table: ") for page in pages.values()) > 5
    for name, page in pages.items():
        assert tables.written(page, tables.load()) == page, f"{name}: run `python -m benchmarks.tables`"


@pytest.mark.parametrize(
    ("most", "value", "verdict"),
    [(True, 1.2, "met"), (True, 1.5, "**missed by 20%**"), (False, 2.0, "met"), (False, 1.0, "**missed by 20%**")],
)
def test_an_aim_that_is_missed_says_by_how_much(most, value, verdict, importable):
    from benchmarks.tables import Aim

    assert Aim("seconds", lambda _: value, 1.25, most=most).row({})[-1] == verdict


def test_a_name_of_which_there_is_no_table_is_refused(importable):
    from benchmarks import tables

    with pytest.raises(ValueError, match="there is no table 'speed'"):
        tables.written("<!-- table: speed -->\n<!-- end -->", {})
