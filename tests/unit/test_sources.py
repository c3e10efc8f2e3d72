"""Sources and readers: which files, which rows, and what is said about those that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config.data import DatasetSource
from distill_ray.errors import DataError, InputError, NoReadableRow
from distill_ray.pipeline.planning import textfile
from distill_ray.pipeline.planning.readers import SourceRow, estimate_rows, read_rows
from distill_ray.pipeline.planning.sources import SourceFile, resolve

RECORDS: list[dict[str, Any]] = [
    {"id": "1", "text": 'one, "two"\nthree'},
    {"id": "2", "text": "né 日本 \x00"},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CSV = 'id,text\n1,"one, ""two""\nthree"\n2,né 日本 \x00\n'


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: str | Path | list[str], **keys: Any) -> list[SourceRow]:
    encoding = keys.pop("encoding", "utf-8")
    source = source if isinstance(source, list) else str(source)
    return [row for file in resolve(source, **keys) for row in read_rows(file, encoding)]


def write_as(name: str, folder: Path) -> Path:
    """RECORDS in the format that `name` says."""
    path = folder / name
    plain = name.removesuffix(".gz")
    if plain.endswith(".lance"):
        import lance

        lance.write_dataset(pa.Table.from_pylist(RECORDS), str(path))
        return path
    if plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=1)
        return path
    text = {".jsonl": LINES, ".ndjson": LINES, ".json": json.dumps(RECORDS, indent=1), ".csv": CSV}[
        os.path.splitext(plain)[1]
    ]
    return write(path, gzip.compress(text.encode()) if name != plain else text)


@pytest.mark.parametrize(
    "name",
    [
        "q.jsonl",
        "q.ndjson",
        "q.json",
        "q.csv",
        "q.parquet",
        "q.lance",
        "q.jsonl.gz",
        "q.json.gz",
        "q.csv.gz",
        "Q.JSONL",
    ],
)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, LINES) if name == "Q.JSONL" else write_as(name, tmp_path)
    rows = read(path)
    assert [row.columns for row in rows] == RECORDS
    assert [json.loads(row.json) for row in rows] == RECORDS
    assert [row.error for row in rows] == [None, None]
    assert all(row.label.startswith(name + ":") for row in rows)
    assert estimate_rows(resolve(str(path))[0]) == len(RECORDS)


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.jsonl.gz"])
def test_the_number_of_rows_is_estimated_from_the_first_ones(name: str, tmp_path: Path) -> None:
    texts = [f"query number {i} of some length" for i in range(5000)]
    content = {
        "q.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "q.json": json.dumps([{"text": text} for text in texts]),
        "q.csv": "text\n" + "".join(text + "\n" for text in texts),
    }[name.removesuffix(".gz")].encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert 1000 <= estimate_rows(resolve(str(path))[0]) <= 7500


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "q.json", LINES))
    assert [row.columns for row in rows] == RECORDS
    assert [row.label for row in rows] == ["q.json:1", "q.json:2"]


def test_byte_order_marks_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    assert read(write(tmp_path / "q.csv", "\ufeffid,text\r\n1,one\r\n"))[0].columns == {
        "id": "1",
        "text": "one",
    }
    assert read(write(tmp_path / "q.jsonl", '\ufeff{"text": "one"}\r\n\r\n'))[0].columns == {"text": "one"}


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", '{"text": "né"}\n'.encode("utf-16"))
    assert read(path, encoding="utf-16")[0].columns == {"text": "né"}


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert [row.columns["text"] for row in read(path)] == ["a\u2028b\u0085c"]


def test_a_very_long_query_is_just_a_query(tmp_path: Path) -> None:
    long = "word " * 300_000
    assert read(write(tmp_path / "q.jsonl", json.dumps({"text": long})))[0].columns["text"] == long
    assert read(write(tmp_path / "q.csv", f"text\n{long}\n"))[0].columns["text"] == long
    assert read(write(tmp_path / "q.json", json.dumps([{"text": long}])))[0].columns["text"] == long


# -- bad rows ------------------------------------------------------------------------------------------------

GOOD_LINE = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "line", "error", "raw"),
    [
        ("q.jsonl", GOOD_LINE + '{"text": \n', 2, "line 2 is not JSON", '{"text":'),
        ("q.jsonl", GOOD_LINE + '\n["a"]\n', 3, "not a JSON object but a list", '["a"]'),
        ("q.jsonl", GOOD_LINE + "17\n", 2, "not a JSON object but a number (17)", "17"),
        ("q.jsonl", GOOD_LINE + '"a"\n', 2, "not a JSON object but text", '"a"'),
        ("q.jsonl", GOOD_LINE + "null\n", 2, "not a JSON object but null", "null"),
        ("q.jsonl", GOOD_LINE + '{"text": "\\ud83d"}\n', 2, "surrogate", "\\ud83d"),
        ("q.jsonl", GOOD_LINE + "[" * 100_000 + "\n", 2, "not JSON", "[["),
        ("q.jsonl", GOOD_LINE + '{"n": 1' + "0" * 5000 + "}\n", 2, "not JSON", "000"),
        ("q.json", '[{"text": "good"}, 17]', 2, "not a JSON object", "17"),
        ("q.csv", "id,text\n1,good\n2,bad,worse\n", 3, "3 fields, the header has 2", "2,bad,worse\n"),
        ("q.csv", "id,text\n1,good\n2\n", 3, "1 fields, the header has 2", "2\n"),
    ],
)
def test_a_bad_row_is_data_with_its_line_reason_and_raw_text(
    name: str, content: str, line: int, error: str, raw: str, tmp_path: Path
) -> None:
    good, bad = read(write(tmp_path / name, content))
    assert good.error is None
    assert bad.label == f"{name}:{line}"
    assert bad.error is not None
    assert error in bad.error
    assert raw in bad.columns["raw"]
    assert json.loads(bad.json) == bad.columns
    bad.json.encode()  # storable


def test_reading_goes_on_behind_a_bad_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "q.csv", "id,text\n1\n2,good\n\n3,good\n"))
    assert [(row.label, row.error is None) for row in rows] == [
        ("q.csv:2", False),
        ("q.csv:3", True),
        ("q.csv:5", True),
    ]


def test_a_quote_that_is_never_closed_costs_only_its_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "q.csv", 'id,text\n1,good\n2,"never closed\n3,x\n4,"a, b"\n5,"two\nlines"\n'))
    assert [(row.label, row.error is None) for row in rows] == [
        ("q.csv:2", True),
        ("q.csv:3", False),
        ("q.csv:4", True),
        ("q.csv:5", True),
        ("q.csv:6", True),
    ]
    assert rows[1].columns["raw"] == '2,"never closed\n'
    assert [row.columns["text"] for row in rows[2:]] == ["x", "a, b", "two\nlines"]


def test_parquet_text_that_is_not_utf_8_costs_only_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "q.parquet")
    good, bad = read(tmp_path / "q.parquet")
    assert good.columns == {"text": "good"}
    assert bad.error is not None
    assert "not UTF-8" in bad.error


# -- bad files -----------------------------------------------------------------------------------------------


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"] * 100}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("q.jsonl", "", ["q.jsonl", "no rows in this file"]),
        ("q.jsonl", "\n \n", ["q.jsonl", "no rows in this file"]),
        (
            "q.jsonl",
            "Dear diary,\ntoday\n",
            ["q.jsonl", "none of its 2 rows is readable", "line 1 is not JSON"],
        ),
        ("q.json", "", ["q.json", "no rows in this file"]),
        ("q.json", "[]", ["q.json", "no rows in this file"]),
        ("q.json", '{\n"text": "a"\n}\n{\n"text": ', ["q.json", "broken JSON after object 1"]),
        ("q.json", '[{"text": "a"}, {"text": ', ["q.json", "broken JSON array after element 1"]),
        ("q.json", '[{"text": "a"} {"text": "b"}]', ["q.json", "expected , or ] but found {"]),
        ("q.json", '[{"text": "a"}]\n[{"text": "b"}]', ["q.json", "behind the closing ]"]),
        ("q.csv", "", ["q.csv", "no rows in this file"]),
        ("q.csv", "id,text\n", ["q.csv", "no rows in this file"]),
        ("q.csv", "text,text\na,b\n", ["q.csv", "'text' twice"]),
        (
            "q.jsonl",
            '{"text": "caf\u00e9"}\n'.encode("latin-1"),
            ["q.jsonl", "byte 13 is 0xe9", "data.encoding"],
        ),
        ("q.csv", "text\ncaf\u00e9\n".encode("latin-1"), ["q.csv", "byte 8 is 0xe9", "data.encoding"]),
        ("q.jsonl.gz", b"not gzip at all", ["q.jsonl.gz", "cannot be read"]),
        ("q.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], ["q.jsonl.gz", "cannot be read"]),
        ("q.parquet", parquet_bytes()[:-20], ["q.parquet", "cannot be read as parquet", "cut off"]),
        ("q.parquet", b"", ["q.parquet", "cannot be read as parquet"]),
        ("q.txt", "some text", ["q.txt", "unknown ending", ".jsonl", "data.format"]),
        ("q.parquet.gz", b"x", ["q.parquet.gz", "unknown ending"]),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(
    name: str, content: str | bytes, messages: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(path) in str(error.value)
    for message in messages:
        assert message in str(error.value)
    assert error.value.exit_code == (1 if isinstance(error.value, NoReadableRow) else 2)


def test_the_offset_of_a_wrong_byte_counts_from_the_start_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfile, "CHUNK_BYTES", 64)
    path = write(tmp_path / "q.jsonl", GOOD_LINE.encode() * 100 + b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=f"byte {len(GOOD_LINE) * 100 + 10} is 0xe9"):
        read(path)


def test_an_unknown_encoding_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.encoding must name an encoding"):
        read(write(tmp_path / "q.jsonl", LINES), encoding="utf-9")


def test_a_missing_lance_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "q.lance").mkdir()
    with pytest.raises(DataError, match=r"q\.lance"):
        read(tmp_path / "q.lance")


# -- which files ---------------------------------------------------------------------------------------------


def test_a_folder_means_all_data_files_below_it_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.csv", ".hidden/0.jsonl", "b/.part.jsonl", "_SUCCESS", "README.md"):
        write(tmp_path / name, "text\nx\n" if name.endswith("csv") else GOOD_LINE)
    write_as("c.lance", tmp_path)
    assert [file.label for file in resolve(str(tmp_path))] == ["a/1.csv", "b/2.jsonl", "c.lance"]


def test_a_folder_that_datasets_has_saved_is_refused_with_what_to_write(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "parts")
    for name in ("one", "parts"):
        folder = str(tmp_path / name)
        with pytest.raises(DataError, match=rf"a saved data set .*; write {{dataset: {re.escape(folder)}}}"):
            resolve(folder)
        [file] = resolve(DatasetSource(dataset=folder))
        assert [row.columns["text"] for row in read_rows(file)] == ["a", "b"]


def test_a_glob_means_the_data_files_that_it_matches(tmp_path: Path) -> None:
    for name in ("a/1.jsonl", "b/2.jsonl", "b/3.csv", "b/notes.md"):
        write(tmp_path / name, GOOD_LINE)
    assert [file.label for file in resolve(str(tmp_path / "*/*.jsonl"))] == ["a/1.jsonl", "b/2.jsonl"]
    assert [file.label for file in resolve(str(tmp_path / "b/*"))] == ["2.jsonl", "3.csv"]


def test_a_list_names_several_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", GOOD_LINE), write(tmp_path / "2.jsonl", GOOD_LINE)
    assert [row.label for row in read([str(two), str(tmp_path), str(one)])] == ["2.jsonl:1", "1.jsonl:1"]


def test_a_file_may_have_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].jsonl", GOOD_LINE)
    assert [row.label for row in read(path)] == ["a[1].jsonl:1"]


def test_the_format_key_overrules_the_ending(tmp_path: Path) -> None:
    path = write(tmp_path / "q.log", GOOD_LINE)
    assert read(path, format="jsonl")[0].columns == {"text": "good"}


def test_a_source_may_lie_on_an_object_store() -> None:
    with fsspec.open("memory://bucket/q.jsonl", "w") as file:
        file.write(LINES)
    assert [row.columns for row in read("memory://bucket/q.jsonl")] == RECORDS
    assert [row.columns for row in read("memory://bucket")] == RECORDS


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("quieries.jsonl", ["data.source", "no such file", "did you mean", "queries.jsonl"]),
        ("nowhere/at/all.jsonl", ["no such file", "queries.jsonl"]),
        ("*.csv", ["no file matches this glob", "queries.jsonl"]),
        ("*.md", ["matches only", "README.md", "no data file"]),
        ("empty", ["no data file in this folder", ".parquet"]),
        ("nosuch://bucket/q.jsonl", ["nosuch", "cannot open this location"]),
    ],
)
def test_a_source_that_names_nothing_says_what_is_there(source: str, messages: list[str], tmp_path: Path) -> None:
    write(tmp_path / "queries.jsonl", LINES)
    write(tmp_path / "README.md", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        resolve(source if "://" in source else str(tmp_path / source))
    for message in messages:
        assert message in str(error.value)


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.source: names no file"):
        resolve([])


# -- properties ----------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=8), st.integers(1, 50), st.sampled_from([None, 1]))
def test_a_json_array_reads_the_same_in_pieces_of_any_size(
    values: list[Any], chunk_bytes: int, indent: int | None
) -> None:
    class Pieces:
        """A file system of one file."""

        protocol = "file"

        def open(self, path: str, mode: str) -> Any:
            return io.BytesIO(json.dumps(values, indent=indent).encode())

    before = textfile.CHUNK_BYTES
    textfile.CHUNK_BYTES = chunk_bytes
    try:
        file = SourceFile(Pieces(), "q.json", "q.json", "json", 0, "")
        assert list(textfile.array_elements(file, "utf-8")) == values
    finally:
        textfile.CHUNK_BYTES = before


@given(st.lists(st.text(), min_size=1), st.sampled_from(["q.jsonl", "q.json", "q.csv"]))
def test_random_text_is_rows_or_a_data_error(tmp_path_factory: Any, texts: list[str], name: str) -> None:
    path = tmp_path_factory.mktemp("junk") / name
    path.write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    rows, message = None, ""
    try:
        rows = read(path)
    except DataError as error:
        message = str(error)
    if rows is None:
        assert str(path) in message
    else:
        assert rows
        assert all(row.json.encode() for row in rows)
