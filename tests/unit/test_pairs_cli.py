"""`distill-ray pairs`, as a person types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distill_ray.cli import main
from distill_ray.config.serve import StoreConfig
from distill_ray.pipeline.planning.layouts import with_layout
from distill_ray.pipeline.planning.readers import read_rows
from distill_ray.pipeline.planning.sources import resolve
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.store import PairStore, make_store
from tests.unit.pair_maker import pair

CONFIG = """
name: mine
recipe: {type: context, context: {text: Answer.}, query: "{{ text }}"}
data: {source: q.jsonl}
teacher: {type: fake}
serve: {folder: service}
"""
CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hallo"},
    {"role": "assistant", "content": "Hallo!"},
    {"role": "user", "content": [{"type": "text", "text": "Wo ist "}, {"type": "text", "text": "die Post?"}]},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    store = make_store(StoreConfig(), tmp_path / "service")
    called = Answer("Let me look.", "tool_calls", tool_calls=(CALL,))
    store.add(
        [
            pair("Wo ist der \x1b[31mBahnhof?", "German", owner="shop"),
            pair("unused", "German, too", owner="lab", messages=CHAT),
            pair("Such!", said=called, owner="lab", body={"tools": TOOLS}),
        ]
    )
    return store


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distill-ray", "pairs", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out + captured.err

    return command


def test_list_shows_no_text_unless_asked(run, config: str, store: PairStore) -> None:
    status, out = run("list", config)
    assert status == 0
    assert "pairs 3, 0 indexed; 0 deleted" in out
    assert "shop" in out
    assert "Bahnhof" not in out
    assert "German" not in out
    status, out = run("list", config, "--show-text", "--owner", "shop")
    assert "1 of them chosen" in out
    assert "user: Wo ist der \ufffd[31mBahnhof?" in out
    assert "assistant: German" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "arguments", [["list", "CONFIG"], ["export", "CONFIG", "out"], ["delete", "CONFIG", "--owner", "shop"]]
)
def test_where_no_service_has_been_that_is_said_and_nothing_is_made(
    run, config: str, tmp_path: Path, arguments: list[str]
) -> None:
    status, out = run(*[config if argument == "CONFIG" else argument for argument in arguments])
    assert status == 2
    assert f"{tmp_path}/service: no such folder, so no service has been here" in " ".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_list_of_a_service_that_collected_nothing_is_empty_and_names_the_place(
    run, config: str, tmp_path: Path
) -> None:
    (tmp_path / "service").mkdir()
    assert run("list", config) == (0, "pairs 0, 0 indexed; 0 deleted in 0 deletions; in service/pairs\n")
    assert list((tmp_path / "service").iterdir()) == []


@pytest.mark.parametrize("arguments", [["list"], ["export"], ["delete", "--owner", "shop"]])
def test_an_address_at_which_nothing_was_stored_is_no_empty_store_and_stays_as_it_is(
    run, config: str, tmp_path: Path, arguments: list[str]
) -> None:
    what, *others = arguments
    out_file = ["out.jsonl"] if what == "export" else []
    status, out = run(what, config, *out_file, *others, "--set", f"serve.collect.store.url={tmp_path}/nowhere")
    assert status == 1
    assert f"{tmp_path}/nowhere: no pairs are stored there yet" in " ".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_teacher_is_listed_by_its_short_name(run, config: str, tmp_path: Path) -> None:
    store = make_store(StoreConfig(), tmp_path / "service")
    store.add([pair("a", teacher="vllm:demo@bd68:{'max_model_len': 1024}")])
    assert "  vllm:demo  " in run("list", config)[1]


def test_list_shows_the_newest(run, config: str, store: PairStore) -> None:
    import dataclasses

    newest = dataclasses.replace(pair("new"), created=2 * 10**18)
    store.add([newest])
    _, out = run("list", config, "--limit", "1")
    assert out.startswith(f"{newest.pair_id}  2033-05-18 03:33:20  shop  openai/large@1  7+1 tokens  not indexed\n")
    assert len(out.splitlines()) == 2


def test_exported_messages_are_chats_with_the_answer_and_the_tools(
    run, config: str, store: PairStore, tmp_path: Path
) -> None:
    status, out = run("export", config, str(tmp_path / "out.jsonl"))
    assert (status, out.splitlines()[0]) == (0, "3 pairs of service/pairs")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_answer = {line["messages"][-1]["content"]: line for line in lines}
    assert by_answer["German, too"] == {"messages": [*CHAT, {"role": "assistant", "content": "German, too"}]}
    assert by_answer["Let me look."]["tools"] == TOOLS
    assert by_answer["Let me look."]["messages"][-1]["tool_calls"] == [CALL]


def test_exported_parquet_is_what_data_reads(run, config: str, store: PairStore, tmp_path: Path) -> None:
    status, out = run("export", config, str(tmp_path / "out.parquet"), "--format", "parquet")
    assert (status, out.splitlines()[0]) == (
        0,
        "2 pairs of service/pairs; 1 with tool calls left out (--format messages has them)",
    )
    [file] = resolve(str(tmp_path / "out.parquet"))
    rows = {row.columns["answer"]: row for row in with_layout(read_rows(file), "messages")}
    assert rows.keys() == {"German", "German, too"}
    row = rows["German, too"]
    assert (row.error, row.columns["text"], row.columns["system"]) == (None, "Wo ist die Post?", "Be brief.")
    assert row.history == CHAT[1:3]
    assert row.columns["owner"] == "lab"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--format", "csv"], 2, "there are: messages, parquet"),
        (["--owner", "nobody"], 1, "no pair to write"),
        (["--format", "parquet", "--contains", "such!"], 1, "1 have tool calls"),
    ],
)
def test_an_export_that_cannot_be_says_so_and_leaves_no_file(
    run, config: str, store: PairStore, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    code, out = run("export", config, str(tmp_path / "out"), *arguments)
    assert (code, sorted(tmp_path.iterdir())) == (status, before)
    assert message in out
    (tmp_path / "there").write_text("mine")
    assert run("export", config, str(tmp_path / "there"))[0] == 2
    assert (tmp_path / "there").read_text() == "mine"


def test_delete_says_how_many_and_a_dry_run_deletes_none(run, config: str, store: PairStore) -> None:
    assert run("delete", config, "--owner", "lab", "--dry-run") == (0, "would delete 2 of 3 pairs in service/pairs\n")
    assert store.count() == 3
    assert run("delete", config, "--owner", "lab", "--contains", "POST") == (
        0,
        "deleted 1 pairs; 2 are left in service/pairs\n",
    )
    pair_id = next(iter(store.scan(columns=["pair_id"]))).to_pylist()[0]["pair_id"]
    assert run("delete", config, "--id", pair_id, "--id", "no such") == (
        0,
        "deleted 1 pairs; 1 are left in service/pairs\n",
    )
    assert "2 deleted in 2 deletions" in run("list", config)[1]


@pytest.mark.parametrize("arguments", [[], ["--contains", ""], ["--owner", ""], ["--owner", "a", "--contains", ""]])
def test_delete_never_takes_nothing_for_everything(run, config: str, store: PairStore, arguments: list[str]) -> None:
    status, out = run("delete", config, *arguments)
    assert status == 2
    assert "say which" in out
    assert store.count() == 3


def test_a_store_that_is_away_is_one_clear_message(run, config: str) -> None:
    setting = "serve.collect.store={type: qdrant, url: 'http://127.0.0.1:9'}"
    status, out = run("list", config, "--set", setting)
    assert status == 1
    assert "is the server of serve.collect.store.url up" in " ".join(out.split())
    assert "Traceback" not in out
