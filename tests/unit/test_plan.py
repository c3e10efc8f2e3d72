"""Planning: every row is in rows/ once, in one split, in a partition that only its own rows can change."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError, DataError, InputError, NoReadableRow
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning import plan as plan_module
from distill_ray.pipeline.planning import textfile
from distill_ray.pipeline.planning.plan import Plan, plan_rows
from distill_ray.pipeline.planning.planner import Planner, normalise
from distill_ray.pipeline.planning.readers import SourceRow
from distill_ray.recipes import make_recipe
from distill_ray.records import ROW_SCHEMA, row_from_record


class Bench:
    """A folder with sources in it, and a run folder to plan them into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunFolder(folder / "run")

    def write(self, name: str, records: list[Any] | str) -> str:
        path = self.folder / name
        lines = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(lines, encoding="utf-8")
        return str(path)

    def config(self, **keys: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "recipe": {"type": "context", "context": {"text": "x"}, **keys.pop("recipe", {})},
            "teacher": {"type": "fake", **keys.pop("teacher", {})},
            "data": {"source": "q.jsonl", **keys.pop("data", {})},
            **keys,
        }
        return parse_config(raw, base=self.folder)

    def plan(self, limit: int | None = None, **keys: Any) -> Plan:
        config = self.config(**keys)
        return plan_rows(config, make_recipe(config.recipe), self.run, limit)

    def rows(self) -> list[dict[str, Any]]:
        return [record for table in self.run.read_tables("rows") for record in table.to_pylist()]

    def by_source(self) -> dict[str, dict[str, Any]]:
        return {record["source"]: record for record in self.rows()}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def texts(*queries: Any) -> list[dict[str, Any]]:
    return [{"text": query} for query in queries]


MANY = texts(*(f"query {i}" for i in range(300)))


def test_a_planned_row_has_all_that_later_stages_need(bench: Bench) -> None:
    bench.write("q.jsonl", [{"id": 7, "text": "Bonjour", "lang": "fr"}])
    plan = bench.plan(data={"id": "id", "holdout": 0, "validation_holdout": 0}, evaluate={"reference": "lang"})
    [record] = bench.rows()
    assert record["reject_reason"] is None
    row = row_from_record(record)
    assert (row.row_id, row.split, row.query, row.reference) == ("7", "train", "Bonjour", "fr")
    assert row.columns == {"id": 7, "text": "Bonjour", "lang": "fr"}
    assert row.source == "q.jsonl:1"
    assert plan.rows_in == sum(partition.num_rows for partition in plan.partitions) == 1


def test_each_partition_is_one_file_even_an_empty_one(bench: Bench) -> None:
    bench.write("q.jsonl", texts("one"))
    plan = bench.plan()
    assert [partition.index for partition in plan.partitions] == list(range(plan.num_partitions))
    assert bench.run.list("rows", suffix=".parquet") == [f"{i:05d}.parquet" for i in range(plan.num_partitions)]
    for partition in plan.partitions:
        table = bench.run.read_table("rows", f"{partition.index:05d}.parquet")
        assert table.num_rows == partition.num_rows
        assert table.schema.names == ROW_SCHEMA.names
        assert table.schema.metadata == ROW_SCHEMA.metadata
    assert not bench.run.exists(".tmp-plan")


# -- bad rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "keys", "reason", "detail"),
    [
        ('{"text": ', {}, "unreadable_row", "line 2 is not JSON"),
        ("[1]", {}, "unreadable_row", "not a JSON object but a list"),
        ('{"text": "\\ud800"}', {}, "unreadable_row", "surrogate"),
        ('{"txt": "a"}', {}, "missing_column", "no column `text`"),
        ('{"text": null}', {}, "not_text", "`text` is null"),
        ('{"text": 5}', {}, "not_text", "`text` is a number (5)"),
        ('{"text": ["a"]}', {}, "not_text", "`text` is a list"),
        ('{"text": ""}', {}, "empty_query", "the query is empty"),
        ('{"text": " \\u00a0\\n"}', {}, "empty_query", "the query is empty"),
        ('{"text": " GOOD\\u00a0 one"}', {"dedup": True}, "duplicate", "same query as q.jsonl:1"),
        ('{"text": "b", "id": "1"}', {"id": "id"}, "duplicate_id", "id '1' occurred before, at q.jsonl:1"),
        ('{"text": "b", "id": 1}', {"id": "id"}, "duplicate_id", "q.jsonl:1"),
        ('{"text": "b"}', {"id": "id"}, "missing_column", "no column `id` (data.id)"),
        ('{"text": "b", "id": null}', {"id": "id"}, "not_text", "`id` (data.id) is null"),
        ('{"text": "b", "id": " "}', {"id": "id"}, "not_text", "`id` (data.id) is empty"),
        ('{"text": "b", "id": ["x"]}', {"id": "id"}, "not_text", "`id` (data.id) is a list"),
    ],
)
def test_a_bad_row_is_planned_with_its_reason(
    line: str, keys: dict[str, Any], reason: str, detail: str, bench: Bench
) -> None:
    bench.write("q.jsonl", '{"id": "1", "text": "good one"}\n' + line + "\n")
    plan = bench.plan(data=keys)
    found = bench.by_source()
    assert plan.rows_in == len(found) == 2
    assert found["q.jsonl:1"]["reject_reason"] is None
    bad = found["q.jsonl:2"]
    assert bad["reject_reason"] == reason
    assert detail in bad["reject_detail"]
    assert json.loads(bad["columns"])  # the raw row is kept
    assert bad["row_id"] != found["q.jsonl:1"]["row_id"]


def test_numbers_are_fine_inside_a_larger_template(bench: Bench) -> None:
    bench.write("q.jsonl", [{"a": 1, "b": 2.5}])
    bench.plan(recipe={"query": "{{ a }} + {{ b }}"})
    assert bench.rows()[0]["query"] == "1 + 2.5"


def test_template_syntax_in_a_value_stays_text(bench: Bench) -> None:
    bench.write("q.jsonl", texts("{{ 7 * 7 }} {% if %}"))
    bench.plan()
    assert bench.rows()[0]["query"] == "{{ 7 * 7 }} {% if %}"


def test_a_reference_that_is_not_text_is_kept_as_json_text(bench: Bench) -> None:
    bench.write("q.jsonl", [{"text": "a", "y": 3}, {"text": "b", "y": None}, {"text": "c"}, {"text": "d", "y": "z"}])
    bench.plan(evaluate={"reference": "y"})
    assert {r["query"]: r["reference"] for r in bench.rows()} == {"a": "3", "b": None, "c": None, "d": "z"}


# -- bad input as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "keys", "error", "message"),
    [
        (
            '{"id": 1, "text": "a"}\n',
            {"recipe": {"query": "{{ txt }}"}},
            ConfigError,
            "recipe.query: unknown column `txt`; data.source has: id, text",
        ),
        (
            '{"text": "a"}\n',
            {"recipe": {"context": {"column": "rules"}}},
            ConfigError,
            "recipe.context.column: unknown column `rules`; data.source has: text",
        ),
        ('{"text": "a"}\n', {"data": {"id": "key"}}, ConfigError, "data.id: unknown column `key`"),
        (
            '{"text": "a"}\n',
            {"evaluate": {"reference": "gold"}},
            ConfigError,
            "evaluate.reference: unknown column `gold`",
        ),
        ("not json\n", {}, DataError, "none of its 1 rows is readable"),
        ("", {}, DataError, "no rows in this file"),
        ('{"text": "a"}\n', {"data": {"source": "nope.jsonl"}}, DataError, "data.source"),
        ('{"text": "a"}\n', {"data": {"test": "nope.jsonl"}}, DataError, "data.test"),
    ],
)
def test_input_that_is_wrong_as_a_whole_stops_before_anything_is_written(
    content: str, keys: dict[str, Any], error: type[InputError], message: str, bench: Bench
) -> None:
    bench.write("q.jsonl", content)
    with pytest.raises(error) as raised:
        bench.plan(**keys)
    assert message in str(raised.value)
    assert not bench.run.exists("rows")


def test_a_csv_file_without_a_header_is_told_so(bench: Bench) -> None:
    bench.write("q.csv", "1,Bonjour\n2,Hola\n")
    with pytest.raises(ConfigError, match=r"data.source has: 1, Bonjour .does the CSV file lack a header line"):
        bench.plan(data={"source": "q.csv"})


def test_a_column_that_only_some_rows_have_is_known(bench: Bench) -> None:
    bench.write("q.jsonl", [{"other": 1}, {"text": "a"}])
    bench.plan()
    assert Counter(record["reject_reason"] for record in bench.rows()) == {None: 1, "missing_column": 1}


# -- ids -------------------------------------------------------------------------------------------------


def test_identical_rows_without_ids_get_distinct_ids(bench: Bench) -> None:
    bench.write("q.jsonl", texts("same", "same", "other", "same"))
    bench.plan()
    same = sorted(record["row_id"] for record in bench.rows() if record["query"] == "same")
    assert len(same[0]) == 16
    assert same[1:] == [f"{same[0]}-2", f"{same[0]}-3"]
    assert all(record["reject_reason"] is None for record in bench.rows())


def test_an_id_does_not_depend_on_the_order_of_columns_or_rows(bench: Bench) -> None:
    bench.write("q.jsonl", '{"text": "a", "x": 1}\n{"text": "b"}\n')
    bench.plan()
    before = {record["query"]: record["row_id"] for record in bench.rows()}
    bench.write("q.jsonl", '{"text": "b"}\n{"x": 1, "text": "a"}\n{"text": "c"}\n')
    bench.plan()
    after = {record["query"]: record["row_id"] for record in bench.rows()}
    assert {query: after[query] for query in before} == before


def test_a_made_up_id_never_meets_a_given_one(bench: Bench) -> None:
    rows = [{"id": i, "text": f"q {n}"} for n, i in enumerate(["a#2", "a", "a", "a", "a#2"])]
    bench.write("q.jsonl", rows)
    bench.plan(data={"id": "id"})
    ids = [record["row_id"] for record in bench.rows()]
    assert len(set(ids)) == len(ids) == 5
    assert Counter(r["reject_reason"] for r in bench.rows()) == {None: 2, "duplicate_id": 3}


# -- splits ----------------------------------------------------------------------------------------------


def test_splits_follow_the_shares(bench: Bench) -> None:
    bench.write("q.jsonl", texts(*(f"query {i}" for i in range(2000))))
    bench.plan(data={"holdout": 0.2, "validation_holdout": 0.1})
    count = Counter(record["split"] for record in bench.rows())
    assert 330 < count["test"] < 470
    assert 140 < count["validation"] < 260


def test_sources_of_their_own_give_their_split_and_their_queries_are_not_trained_on(bench: Bench) -> None:
    bench.write("test.jsonl", texts("only tested", "Tested and trained"))
    bench.write("validation.jsonl", texts("validated", "only  TESTED"))
    bench.write("q.jsonl", [*MANY, *texts("tested AND trained", "validated")])
    data = {"test": "test.jsonl", "validation": "validation.jsonl", "holdout": 0.5, "validation_holdout": 0.4}
    plan = bench.plan(data=data)
    assert plan.rows_in == 306
    found = bench.by_source()
    assert {found[f"test.jsonl:{n}"]["split"] for n in (1, 2)} == {"test"}
    assert found["validation.jsonl:1"]["split"] == "validation"
    assert {record["split"] for source, record in found.items() if source.startswith("q.")} == {"train"}
    rejected = {source: r["reject_detail"] for source, r in found.items() if r["reject_reason"] == "duplicate"}
    assert rejected == {
        "validation.jsonl:2": "also in the test source, at test.jsonl:1",
        "q.jsonl:301": "also in the test source, at test.jsonl:2",
        "q.jsonl:302": "also in the validation source, at validation.jsonl:1",
    }


def test_with_a_test_source_only_validation_is_still_held_out_by_hash(bench: Bench) -> None:
    bench.write("test.jsonl", texts("tested"))
    bench.write("q.jsonl", MANY)
    bench.plan(data={"test": "test.jsonl", "validation_holdout": 0.3})
    count = Counter(record["split"] for record in bench.rows())
    assert count["test"] == 1
    assert 50 < count["validation"] < 130


def test_a_reference_is_needed_only_where_rows_are_tested(bench: Bench) -> None:
    bench.write("test.jsonl", [{"text": "a", "gold": "x"}])
    bench.write("q.jsonl", texts("b"))
    assert bench.plan(data={"test": "test.jsonl"}, evaluate={"reference": "gold"}).rows_in == 2


# -- partitions ------------------------------------------------------------------------------------------


def test_partitions_are_sorted_by_id_and_equal_queries_share_one(bench: Bench) -> None:
    bench.write("q.jsonl", [{"text": f"query {i % 50}", "n": i} for i in range(200)])
    plan = bench.plan(generate={"rows_per_partition": 20})
    assert plan.num_partitions == 10
    home: dict[str, int] = {}
    for partition in plan.partitions:
        records = bench.run.read_table("rows", f"{partition.index:05d}.parquet").to_pylist()
        ids = [record["row_id"] for record in records]
        assert ids == sorted(ids)
        for record in records:
            assert home.setdefault(record["query"], partition.index) == partition.index


def test_adding_rows_changes_only_the_partitions_they_fall_into(bench: Bench) -> None:
    bench.write("q.jsonl", MANY)
    before = bench.plan(generate={"rows_per_partition": 10})
    bench.write("q.jsonl", [*texts("one more", "and another"), *MANY])  # in front: all line numbers move
    after = bench.plan(generate={"rows_per_partition": 10})
    assert after.num_partitions == before.num_partitions == 30
    assert after.rows_in == before.rows_in + 2
    changed = [a.index for a, b in zip(after.partitions, before.partitions, strict=True) if a.sha != b.sha]
    assert 1 <= len(changed) <= 2


def test_the_number_of_partitions_is_kept_when_the_data_grows(bench: Bench) -> None:
    bench.write("q.jsonl", MANY[:10])
    assert bench.plan(generate={"rows_per_partition": 10}).num_partitions == 4
    bench.write("q.jsonl", MANY)
    assert bench.plan(generate={"rows_per_partition": 10}).num_partitions == 4


def test_a_subsample_is_part_of_a_larger_one_and_leaves_what_is_held_out_whole(bench: Bench) -> None:
    bench.write("q.jsonl", MANY)

    def queries(share: float) -> dict[str, set[str]]:
        bench.plan(data={"subsample": share, "holdout": 0.2})
        found: dict[str, set[str]] = {}
        for row in bench.rows():
            found.setdefault(row["split"], set()).add(row["query"])
        return found

    whole, half, tenth = queries(1.0), queries(0.5), queries(0.1)
    assert tenth["train"] < half["train"] < whole["train"]
    assert abs(len(half["train"]) / len(whole["train"]) - 0.5) < 0.15
    assert tenth["test"] == half["test"] == whole["test"]


def test_without_its_plan_the_files_still_say_the_number_of_partitions(bench: Bench) -> None:
    """Else rows would stand in two partitions, with examples in both."""
    bench.write("q.jsonl", texts(*map(str, range(80))))
    before = bench.plan(generate={"rows_per_partition": 10})
    bench.run.delete("rows", "plan.json")
    after = bench.plan(generate={"rows_per_partition": 20})
    assert after.num_partitions == before.num_partitions


@pytest.mark.parametrize("content", [b"{}", b'{"num_partitions": 8}'])
def test_a_plan_that_lacks_something_is_made_again(bench: Bench, content: bytes) -> None:
    bench.write("q.jsonl", texts("a", "b"))
    before = bench.plan(generate={"rows_per_partition": 10})
    bench.run.write_bytes(content, "rows", "plan.json")
    assert bench.plan().rows_in == before.rows_in


def test_a_folder_of_sources_that_holds_the_run_does_not_mean_the_runs_own_files(bench: Bench) -> None:
    bench.write("q.jsonl", texts("a", "b"))
    bench.plan()
    bench.run.write_json({"name": "x"}, "manifest.json")
    assert bench.plan(data={"source": str(bench.folder)}).rows_in == 2


@pytest.mark.parametrize(
    ("replicas", "rows_per_partition", "num_partitions"),
    [(1, 2000, 4), (3, 2000, 12), (1000, 2000, 256), (1, 7, 43)],
)
def test_the_number_of_partitions_follows_rows_and_replicas(
    replicas: int, rows_per_partition: int, num_partitions: int, bench: Bench
) -> None:
    bench.write("q.jsonl", MANY)
    keys = {"teacher": {"replicas": replicas}, "generate": {"rows_per_partition": rows_per_partition}}
    assert bench.plan(limit=5, **keys).num_partitions == num_partitions


# -- limit and repeat ------------------------------------------------------------------------------------


def test_the_limit_counts_for_each_source_and_stops_reading(bench: Bench) -> None:
    bench.write("q.jsonl", "".join(json.dumps(r) + "\n" for r in MANY) + "never reached " * 1000)
    bench.write("test.jsonl", texts("a", "b", "c"))
    plan = bench.plan(limit=2, data={"test": "test.jsonl"})
    assert plan.rows_in == 4
    assert sorted(bench.by_source()) == ["q.jsonl:1", "q.jsonl:2", "test.jsonl:1", "test.jsonl:2"]


def test_nothing_is_read_again_while_nothing_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("q.jsonl", MANY)
    plan = bench.plan()

    def read_again(*args: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(plan_module, "read_rows", read_again)
    assert bench.plan() == plan
    assert bench.plan(train={"epochs": 9}) == plan
    for change in ({"limit": 3}, {"data": {"holdout": 0.3}}, {"recipe": {"query": "Q: {{ text }}"}}):
        with pytest.raises(AssertionError):
            bench.plan(**change)
    os.utime(bench.folder / "q.jsonl", (1, 1))
    with pytest.raises(AssertionError):
        bench.plan()


def test_a_plan_that_was_killed_half_way_is_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("q.jsonl", MANY)
    first = bench.plan()
    write_partition = plan_module._write_partition

    def killed(folder: RunFolder, index: int, records: list[str]) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return write_partition(folder, index, records)

    monkeypatch.setattr(plan_module, "_write_partition", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.plan(limit=10)
    monkeypatch.undo()
    assert bench.plan() == first  # rows/ was a mixture: it does not count as the first plan
    assert len(bench.rows()) == 300


def test_a_run_folder_on_an_object_store_holds_the_same_plan(bench: Bench) -> None:
    bench.write("q.jsonl", MANY)
    config = bench.config()
    local = bench.plan()
    remote = plan_rows(config, make_recipe(config.recipe), RunFolder("memory://runs/plan-test"))
    assert remote == local


# -- properties ------------------------------------------------------------------------------------------

LINE = st.one_of(
    st.text(max_size=30).map(lambda text: text.replace("\n", " ")),
    st.fixed_dictionaries(
        {"text": st.one_of(st.text(max_size=5), st.sampled_from(["Same", "same ", "SAME"]), st.none(), st.integers())},
        optional={"id": st.one_of(st.text(max_size=2), st.none(), st.integers(0, 3))},
    ).map(json.dumps),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINE, max_size=30), st.lists(LINE, max_size=5), st.booleans(), st.booleans())
def test_rows_in_are_rows_planned_and_no_query_is_in_two_splits(
    tmp_path_factory: Any, lines: list[str], held_out: list[str], dedup: bool, with_id: bool
) -> None:
    bench = Bench(tmp_path_factory.mktemp("junk"))
    good = '{"text": "good", "id": "g"}\n'
    for name, content in (("q.jsonl", lines), ("test.jsonl", held_out)):
        text = good + "".join(line + "\n" for line in content)
        (bench.folder / name).write_bytes(text.encode("utf-8", "replace"))
    data = {"test": "test.jsonl", "dedup": dedup, "validation_holdout": 0.4, "id": "id" if with_id else None}
    plan = bench.plan(data=data)
    records = bench.rows()
    assert plan.rows_in == len(records) == 2 + sum(bool(line.strip()) for line in lines + held_out)
    assert len({record["row_id"] for record in records}) == len(records)
    split_of: dict[str, str] = {}
    for record in records:
        if record["reject_reason"] is None:
            key = normalise(record["query"])
            assert split_of.setdefault(key, record["split"]) == record["split"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_spaces_and_capitals_do_not_make_another_query(query: str) -> None:
    assert normalise(f"  {query}\n") == normalise(query)
    assert normalise(query.replace(" ", " \t")) == normalise(query)


@pytest.mark.parametrize(("rows", "error"), [("a;b\nc;d\n", ConfigError), ("a, b;c\nd, e;f\n", NoReadableRow)])
def test_a_csv_file_with_another_separator_is_told_so(rows: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("text;label\n" + rows)
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "q.csv"}, "teacher": {"type": "fake"}}
    config = parse_config(raw, base=tmp_path)
    with pytest.raises(error, match="seems to separate its columns by ';': write it with commas"):
        plan_rows(config, make_recipe(config.recipe), RunFolder(tmp_path / "run"))


# -- a file that changes -----------------------------------------------------------------------------------


def appended(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')


def replaced(path: Path) -> None:
    path.with_name("new").write_text('{"text": "another file"}\n' * 300)
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [appended, replaced, lambda path: path.write_text("{bro"), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused_and_the_same_command_goes_on(
    change: Callable[[Path], object], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(bench.write("q.jsonl", MANY))
    config = bench.config()
    add = Planner.add

    def changing(self: Planner, row: SourceRow, held_out: Any) -> None:
        if self.num_rows == 150:
            change(source)
        add(self, row, held_out)

    monkeypatch.setattr(Planner, "add", changing)
    with pytest.raises(DataError, match=r"q\.jsonl: changed while it was read; run the same command again"):
        plan_rows(config, make_recipe(config.recipe), bench.run)
    assert not bench.run.exists("rows")
    monkeypatch.undo()
    bench.write("q.jsonl", MANY)
    assert bench.plan().rows_in == len(bench.rows()) == 300


def test_what_is_wrong_with_a_file_that_changed_meanwhile_is_that_it_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfile, "CHUNK_BYTES", 64)
    source = Path(bench.write("q.jsonl", MANY))
    add = Planner.add

    def changing(self: Planner, row: SourceRow, held_out: Any) -> None:
        if self.num_rows == 150:
            source.write_bytes(b"\xff" * source.stat().st_size)
        add(self, row, held_out)

    monkeypatch.setattr(Planner, "add", changing)
    with pytest.raises(DataError, match=r"q\.jsonl: changed while it was read"):
        bench.plan()


def test_rows_are_a_copy_so_a_file_replaced_later_is_seen_by_the_next_plan_only(bench: Bench) -> None:
    source = Path(bench.write("q.jsonl", MANY))
    bench.plan()
    replaced(source)
    assert len(bench.rows()) == len(MANY)
    bench.plan()
    assert {row["query"] for row in bench.rows()} == {"another file"}
