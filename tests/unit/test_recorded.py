"""`distill-ray calibrate --replay FILE.csv`: what a file may hold, what is said of a bad one, what is written."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray.cli import main
from distill_ray.serving.calibration import recorded as module
from distill_ray.serving.calibration import replay as replay_module
from distill_ray.serving.calibration.recorded import default_config, read_recorded, replay_file
from distill_ray.serving.calibration.table import replay_notes
from tests.unit.small_bundle import WordEmbedder

EASY = ["bread", "milk", "water", "apple", "house", "garden", "window", "table", "chair", "paper"]
HARD = ["integral", "theorem", "enzyme", "quark", "matrix", "tensor", "protein", "neutron", "lemma", "axiom"]
NAMES = ["query", "small_right", "large_right", "small_answer", "small_logprob"]
Rows = list[list[Any]]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_embedder", lambda config: WordEmbedder())
    monkeypatch.setattr(replay_module, "NUM_SPLITS", 2)
    monkeypatch.setattr(module, "NUM_SPLITS", 2)


def rows(num: int, seed: int = 0) -> Rows:
    """Requests of easy and of hard words; on hard ones the small model is mostly wrong, and less sure."""
    rng = random.Random(seed)
    made: Rows = []
    for number in range(num):
        words = rng.choice((EASY, HARD))
        query = " ".join([*rng.sample(words, 4), str(number), str(rng.randrange(10**9))])
        is_right = rng.random() < (0.95 if words is EASY else 0.3)
        logprob = -rng.expovariate(4.0 if is_right else 1.5)
        made.append([query, int(is_right), 1, "yes" if is_right else "perhaps", logprob])
    return made


def write(path: Path, made: Rows, names: list[str] = NAMES) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([row[: len(names)] for row in made])
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distill-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_is_shown_and_figures_and_picture_are_written_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "pairs.csv", rows(200))
    assert command(monkeypatch, "calibrate", "--replay", str(path)) == 0
    shown = capsys.readouterr().out
    for expected in ("200 pairs", "random", "similarity only", "neighbour outcomes", "fitted probability"):
        assert expected in shown
    assert "with its answer in view" in shown
    assert max(map(len, shown.partition("wrote:")[0].splitlines())) <= 80
    assert f"wrote: {tmp_path}/pairs-replay.json\nwrote: {tmp_path}/pairs-replay.svg\n" in shown
    figures = json.loads((tmp_path / "pairs-replay.json").read_text())
    assert (figures["file"], figures["rows"], figures["too_long"]) == ("pairs.csv", 200, 0)
    assert figures["routers"]["fitted"]["apgr"]["mean"] > 0.6
    assert b"neighbour outcomes: APGR" in (tmp_path / "pairs-replay.svg").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs-replay.json", "pairs-replay.svg", "pairs.csv"]


def test_a_runs_settings_count_and_set_goes_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "pairs.csv", rows(200))
    run = tmp_path / "run"
    run.mkdir()
    config = {
        "recipe": {"context": {"text": "x"}},
        "data": {"source": "q.jsonl"},
        "teacher": {"type": "fake"},
        "calibrate": {"neighbours": 3, "seed": 5},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for arguments, neighbours, seed in (
        ((), 8, 0),
        (("--set", "calibrate.neighbours=4"), 4, 0),
        ((str(run),), 3, 5),
        ((str(run), "--set", "calibrate.seed=6"), 3, 6),
    ):
        assert command(monkeypatch, "calibrate", *arguments, "--replay", str(path)) == 0
        figures = json.loads((tmp_path / "pairs-replay.json").read_text())
        assert (figures["neighbours"], figures["seed"]) == (neighbours, seed)
    assert [file.name for file in run.iterdir()] == ["config.yaml"], "the run itself stays as it is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "calibrate: name the folder of a run, or a file of recorded pairs (--replay FILE.csv)"),
        (["--replay", "pair.csv"], "pair.csv: no such file; did you mean"),
        (["nowhere", "--replay", "pairs.csv"], "nowhere: not a run folder"),
        (["--replay", "pairs.csv", "--set", "calibrate.neighbors=3"], "calibrate.neighbors"),
        (["--replay", "pairs.csv", "--set", "calibrate.neighbours=0"], "calibrate.neighbours"),
        (["--replay", "."], ".: cannot read it"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "pairs.csv", rows(3))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "calibrate", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_place_that_cannot_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "pairs.csv", rows(150))
    (tmp_path / "pairs-replay.json").mkdir()
    assert command(monkeypatch, "calibrate", "--replay", str(path)) == 1
    assert f"{tmp_path}/pairs-replay.json: cannot write" in capsys.readouterr().err


def changed(column: int, value: Any, num: int = 120) -> Rows:
    made = rows(num)
    made[6][column] = value
    return made


@pytest.mark.parametrize(
    ("made", "names", "message"),
    [
        (rows(40), NAMES, "40 rows, of which 40 have different queries (near-duplicates count once); at least 100"),
        ([], NAMES, "0 rows, of which 0 have different queries"),
        (rows(1) * 300, NAMES, "300 rows, of which 1 have different queries"),
        (rows(120), ["query", "small_right", "teacher"], "no column large_right; it has query, small_right, teacher"),
        (rows(120), ["query;small_right;large_right"], "separate its columns by ';'"),
        (rows(120), ["query", "small_right", "small_right", "large_right"], "the column small_right is there twice"),
        (changed(0, " "), NAMES, "row 7 (the line of names not counted): query: empty"),
        (changed(1, "yes"), NAMES, "row 7 (the line of names not counted): small_right: expected 0 (wrong), 1 (right)"),
        (changed(1, 1.5), NAMES, "small_right: expected 0 (wrong), 1 (right) or a number between (got '1.5')"),
        (changed(2, -1), NAMES, "large_right: expected 0"),
        (changed(2, ""), NAMES, "large_right: expected 0 (wrong), 1 (right) or a number between (got '')"),
        (changed(2, "nan"), NAMES, "large_right: expected 0"),
        (changed(4, 0.2), NAMES, "small_logprob: expected a mean log-probability in nats, 0 at most (got '0.2')"),
        (changed(4, "-inf"), NAMES, "small_logprob: expected"),
        (changed(4, ""), NAMES, "small_logprob: expected"),
        ([[row[0], 1, 1] for row in rows(120)], NAMES[:3], "no gap to recover, so PGR, APGR and CPT have no meaning"),
        ([[row[0], 1, 0] for row in rows(120)], NAMES[:3], "its mean is 0.000, the small one's 1.000"),
    ],
)
def test_a_file_that_says_nothing_is_refused_with_what_and_where(
    made: Rows,
    names: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "pairs.csv", made, names)
    assert command(monkeypatch, "calibrate", "--replay", str(path)) == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "pairs-replay.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"query,small_right,large_right\n" + "caf\xe9".encode("latin-1") + b",1,1\n",
        b"query,small_right,large_right\na,1\n",
        b"\x00\x01\x02PK\x03\x04\n\xff\xfe",
    ],
)
def test_what_is_no_csv_in_utf_8_is_said_to_be_none(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    assert command(monkeypatch, "calibrate", "--replay", str(path)) == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert "Traceback" not in error
    assert "unexpected" not in error


# -- what is read ------------------------------------------------------------------------------------------------------


def test_values_are_read_as_spreadsheets_and_pandas_write_them(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    text = (
        "id,small_answer,query,large_right,small_right,small_logprob\r\n"
        '1,"two\nlines, and ""quotes""",123,True,false,-0\r\n'
        "2,NA, a question ,1.0,0.25,-1e-3\r\n"
        "3,,null, 1 ,TRUE,-2\r\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_recorded(path).to_pylist() == [
        {
            "query": "123",
            "small_right": 0.0,
            "large_right": 1.0,
            "small_answer": 'two\nlines, and "quotes"',
            "small_logprob": 0.0,
        },
        {
            "query": " a question ",
            "small_right": 0.25,
            "large_right": 1.0,
            "small_answer": "NA",
            "small_logprob": -1e-3,
        },
        {"query": "null", "small_right": 1.0, "large_right": 1.0, "small_answer": "", "small_logprob": -2.0},
    ]


def test_queries_that_are_too_long_to_embed_are_left_out_and_counted(tmp_path: Path) -> None:
    made = rows(130)
    for number in range(10):
        made[number][0] = f"{number} " * 300
    found = replay_file(write(tmp_path / "pairs.csv", made), default_config([])).figures
    assert (found["rows_in_file"], found["rows"], found["too_long"]) == (130, 120, 10)
    assert "10 rows left out: the embedder does not read so far" in replay_notes(found)
    with pytest.raises(module.DataError, match=r"0 rows, of which 0 .*; 130 rows left out"):
        replay_file(write(tmp_path / "long.csv", [[row[0] + " x" * 300, *row[1:]] for row in made]), default_config([]))


def test_answers_that_are_empty_or_too_long_are_like_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows(120)
    made[0][3], made[1][3] = "", "word " * 300
    table = read_recorded(write(tmp_path / "pairs.csv", made))
    recorded, _ = module._embedded(table, default_config([]), WordEmbedder())
    assert recorded.answers is not None
    lengths = (recorded.answers.vectors_PD**2).sum(axis=1)
    assert lengths[:2].tolist() == [0.0, 0.0]
    assert lengths[2:] == pytest.approx(1.0, abs=1e-5)
    same = [row for row, text in enumerate(recorded.answers.texts) if text == "yes"]
    assert (recorded.answers.vectors_PD[same] == recorded.answers.vectors_PD[same[0]]).all()


def test_no_more_than_max_pairs_are_measured_and_they_are_drawn_from_the_whole_file(tmp_path: Path) -> None:
    made = sorted(rows(400), key=lambda row: row[1])  # the wrong ones first
    found = replay_file(write(tmp_path / "pairs.csv", made), default_config(["calibrate.max_pairs=150"])).figures
    assert (found["rows_in_file"], found["rows"]) == (400, 150)
    rate = sum(row[1] for row in made) / 400
    assert found["small"] == pytest.approx(rate, abs=0.12)


def test_what_varies_in_requests_is_masked_as_the_service_does(tmp_path: Path) -> None:
    made = [[f"{row[0]} at {number % 24:02d}:30", *row[1:]] for number, row in enumerate(rows(120))]
    table = read_recorded(write(tmp_path / "pairs.csv", made))
    config = default_config([r"serve.fingerprint.ignore=['\d\d:\d\d']"])
    recorded, _ = module._embedded(table, config, WordEmbedder())
    assert all(text.endswith("at […]") for text in recorded.queries.texts)


def test_a_gap_within_its_error_is_warned_of(tmp_path: Path) -> None:
    made = [[row[0], int(number > 2), int(number > 1)] for number, row in enumerate(rows(150))]
    found = replay_file(write(tmp_path / "pairs.csv", made, NAMES[:3]), default_config(["calibrate.seed=1"])).figures
    assert not found["is_sure"]
    notes = " ".join(replay_notes(found))
    assert "these figures are mostly noise; record more pairs" in notes
    assert ("left out" in notes) == (found["splits_left_out"] > 0)
