"""The README's table is made of what was measured, and a benchmark that fails takes nothing from the others."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.run_all import BENCHMARKS, README, RESULTS, ROOT, Benchmark, read_results, renewed, table


def test_the_readmes_table_is_made_of_the_results() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == renewed(readme, read_results())


def test_every_result_names_its_command_and_its_day() -> None:
    results = read_results()
    assert results.keys() <= BENCHMARKS.keys()
    for name, found in results.items():
        assert found["command"] == f"python benchmarks/{BENCHMARKS[name].command}"
        datetime.date.fromisoformat(found["day"])
        assert BENCHMARKS[name].lines(found["figures"])


def test_the_results_name_no_path_of_the_machine_that_made_them() -> None:
    assert '"/' not in RESULTS.read_text(encoding="utf-8")


def test_every_benchmark_is_a_script_that_writes_its_figures() -> None:
    for benchmark in BENCHMARKS.values():
        assert '"--out"' in (ROOT / "benchmarks" / benchmark.command.split()[0]).read_text()


def test_another_figure_is_another_table() -> None:
    results = read_results()
    results["training"]["figures"]["ratio"] = 7.77
    assert "7.77 times" in table(results)
    assert table({}).count("\n") == 1  # the head alone


def test_a_benchmark_that_says_that_its_promise_is_broken_keeps_its_figures_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = "import json, pathlib, sys; pathlib.Path(sys.argv[2]).write_text(json.dumps({'x': 1})); sys.exit(1)"
    (tmp_path / "benchmarks" / "broken.py").write_text(script)
    (tmp_path / "benchmarks" / "crashed.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "results.json")
    monkeypatch.setitem(BENCHMARKS, "broken", Benchmark("broken.py"))
    monkeypatch.setitem(BENCHMARKS, "crashed", Benchmark("crashed.py"))
    assert not run_all.measure("broken")
    before = (tmp_path / "results.json").read_text()
    assert json.loads(before)["broken"]["figures"] == {"x": 1}
    assert not run_all.measure("crashed")
    assert (tmp_path / "results.json").read_text() == before
