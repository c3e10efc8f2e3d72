"""The actor of the generation stage, run without Ray: what it writes, what it rejects, what a rerun pays for."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import DistillError, EngineUnavailable, TooManyRejects
from distill_ray.pipeline import worker
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.tally import Tally
from distill_ray.pipeline.worker import PartitionWorker
from distill_ray.recipes import make_recipe


class LocalTally:
    """A Tally with Ray's calling convention and without Ray."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tally, name)

        class Remote:
            @staticmethod
            def remote(*args: Any) -> asyncio.Future[Any]:
                future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                try:
                    future.set_result(method(*args))
                except TooManyRejects as error:
                    future.set_exception(error)
                return future

        return Remote


@pytest.fixture(autouse=True)
def _keep_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "redirect_output", lambda folder, name: None)


def config_of(tmp_path: Path, rows: list[str], **teacher: Any) -> RunConfig:
    source = tmp_path / "queries.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return parse_config(
        {
            "recipe": {"type": "context", "context": {"text": "Answer."}},
            "data": {"source": str(source)},
            "teacher": {"type": "fake", "answer": "answer to {{ query }}", **teacher},
        }
    )


def run_worker(config: RunConfig, folder: RunFolder, together: bool = False, **tally: Any) -> Tally:
    """Run all partitions, one after the other or together."""
    plan = plan_rows(config, make_recipe(config.recipe), folder)
    settings = {"rows_in": plan.rows_in, "max_reject_frac": 1.0, "max_tokens": None, "rejects": {}, "rows_done": 0}
    counter = Tally(**{**settings, **tally})

    async def all_partitions() -> None:
        shas = [p.sha for p in plan.partitions]
        actor = PartitionWorker(config, folder, "fingerprint", LocalTally(counter), shas)

        async def one(partition: int) -> None:
            async for _ in actor({"partition": np.array([partition])}):
                pass

        if together:
            await asyncio.wait_for(asyncio.gather(*map(one, range(plan.num_partitions))), 60)
        else:
            for partition in range(plan.num_partitions):
                await one(partition)

    asyncio.run(all_partitions())
    return counter


def outcome(folder: RunFolder) -> tuple[dict[str, str], dict[str, str]]:
    """Completions by query and reject reasons by row."""
    examples = [r for t in folder.read_tables("examples") for r in t.to_pylist()]
    rejects = [r for t in folder.read_tables("rejects") for r in t.to_pylist()]
    return (
        {e["messages"][-1]["content"]: e["completion"] for e in examples},
        {r["row_id"]: r["reason"] for r in rejects},
    )


def test_every_row_becomes_examples_or_a_reject(tmp_path: Path) -> None:
    rows = [f"query {i}" for i in range(200)]
    config = config_of(tmp_path, rows, empty_rate=0.1, refusal_rate=0.1, cut_off_rate=0.1, fatal_error_rate=0.1)
    folder = RunFolder(tmp_path / "run")
    run_worker(config, folder)
    examples, rejects = outcome(folder)
    assert len(examples) + len(rejects) == 200
    assert set(rejects.values()) == {"empty_answer", "refused", "cut_off", "engine_error"}
    assert all(completion == f"answer to {query}" for query, completion in examples.items())


def test_a_rerun_pays_only_for_what_may_pass_now(tmp_path: Path) -> None:
    rows = [f"query {i}" for i in range(100)]
    folder = RunFolder(tmp_path / "run")
    first = run_worker(config_of(tmp_path, rows), folder).state()
    again = run_worker(config_of(tmp_path, rows), folder).state()
    assert (first["calls"], first["replayed"]) == (100, 0)
    assert (again["calls"], again["replayed"]) == (0, 100)


def test_calls_and_replays_are_all_answers_that_rows_got_however_many_were_in_flight_together(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = config_of(tmp_path, ["the same"] * 9, max_concurrency=3, latency_s=0.01)
    first, again = run_worker(config, folder).state(), run_worker(config, folder, replayed=5).state()
    assert (first["calls"], first["replayed"]) == (1, 8)
    assert (again["calls"], again["replayed"]) == (0, 9 + 5)  # and those of partitions that were finished before


def test_the_output_is_the_same_whatever_the_order_of_answers(tmp_path: Path) -> None:
    rows = [f"query {i}" for i in range(120)]
    tables = []
    for latency in (0.0, 0.002):
        folder = RunFolder(tmp_path / f"run-{latency}")
        run_worker(config_of(tmp_path, rows, latency_s=latency, max_concurrency=7), folder)
        tables.append([table.drop(["teacher"]).to_pylist() for table in folder.read_tables("examples")])
    assert tables[0] == tables[1]


def test_rows_behind_the_token_budget_wait_for_the_next_run(tmp_path: Path) -> None:
    rows = [f"query {i}" for i in range(40)]
    config = config_of(tmp_path, rows, latency_s=0.02, max_concurrency=2)
    folder = RunFolder(tmp_path / "run")
    run_worker(config, folder, max_tokens=30)
    examples, rejects = outcome(folder)
    assert 0 < len(examples) < 40
    assert set(rejects.values()) == {"token_budget"}
    assert len(examples) + len(rejects) == 40
    assert any(folder.read_json("done", name)["retry"] for name in folder.list("done"))
    after = run_worker(config, folder).state()
    assert outcome(folder)[1] == {}
    assert after["replayed"] == len(examples)


def test_too_many_rejects_stop_the_run_with_counts_reasons_and_an_example(tmp_path: Path) -> None:
    config = config_of(tmp_path, [f"query {i}" for i in range(100)], empty_rate=0.5)
    with pytest.raises(TooManyRejects, match=r"of 100 rows were rejected \(empty_answer \d+\).*max_reject_frac 0.1"):
        run_worker(config, RunFolder(tmp_path / "run"), max_reject_frac=0.1)


def test_an_engine_that_is_unavailable_ends_the_run_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["a", "b"], unavailable=True)
    with pytest.raises(EngineUnavailable):
        run_worker(config, RunFolder(tmp_path / "run"))


def test_equal_queries_share_one_call_and_each_row_has_its_example(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = run_worker(config_of(tmp_path, ["same"] * 10 + ["other"]), folder).state()
    assert state["calls"] == 2
    assert sum(table.num_rows for table in folder.read_tables("examples")) == 11


def test_a_recipe_of_another_package_may_raise_why_a_row_is_no_good(
    tmp_path: Path, example_plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(example_plugin)
    config = config_of(tmp_path, [f"query {i}" for i in range(20)], empty_rate=0.5, answer="{{ query }}!")
    recipe = {"type": "best_of", "reward": {"type": "length", "target": 2}}
    config = parse_config({**config.model_dump(mode="json"), "recipe": recipe})
    folder = RunFolder(tmp_path / "run")
    run_worker(config, folder)
    examples = [record for table in folder.read_tables("examples") for record in table.to_pylist()]
    rejects = [record for table in folder.read_tables("rejects") for record in table.to_pylist()]
    assert {e["completion"] for e in examples} < {f"query {i}!" for i in range(20)}
    assert {(r["stage"], r["reason"]) for r in rejects} == {("generate", "empty_answer")}
    assert len(examples) + len(rejects) == 20


# -- properties ------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(["Same", "same ", "", " ", "\ud83d", "\0", "long " * 20_000, "I cannot", "{{ text }}"]),
    st.text(max_size=8),
    st.none(),
    st.integers() | st.floats() | st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.booleans(), max_size=2),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "id", "more"]), VALUES), min_size=1, max_size=12)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """In the format of the ending; what a format has no form for as text."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    texts = [{name: None if value is None else str(value) for name, value in row.items()} for row in rows]
    if path.suffix == ".parquet":
        columns = {name: [row.get(name) for row in texts] for name in ("text", "id", "more")}
        data = {k: [v and v.encode("utf-8", "surrogatepass") for v in column] for k, column in columns.items()}
        pq.write_table(pa.table({k: pa.array(v, pa.binary()).view(pa.string()) for k, v in data.items()}), path)
        return
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.DictWriter(file, ["text", "id", "more"])
        writer.writeheader()
        writer.writerows(texts)


@settings(max_examples=60)
@given(
    rows=ROWS,
    ending=st.sampled_from(["jsonl", "csv", "parquet"]),
    data=st.fixed_dictionaries({"dedup": st.booleans(), "id": st.sampled_from([None, "id"])}),
    rate=st.sampled_from([0.0, 0.3]),
)
def test_random_rows_are_examples_or_rejects_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ending: str, data: dict[str, Any], rate: float
) -> None:
    base = tmp_path_factory.mktemp("rows")
    write_rows(base / f"rows.{ending}", rows)
    config, folder = config_of(base, [], empty_rate=rate, fatal_error_rate=rate), RunFolder(base / "run")
    raw = config.model_dump(mode="json") | {"data": {"source": str(base / f"rows.{ending}"), **data}}
    try:
        run_worker(parse_config(raw), folder)
    except DistillError:
        assert not folder.list("examples")
        return
    examples = {record["row_id"] for table in folder.read_tables("examples") for record in table.to_pylist()}
    rejects = {record["row_id"] for table in folder.read_tables("rejects") for record in table.to_pylist()}
    assert not examples & rejects
    assert len(examples) + len(rejects) == len(rows)
