"""Everything that an offline command may be given and cannot use: what is wrong, the command, and its one message.

A message says what, where, which value and what to do. Nobody sees a traceback, nothing that was there is lost, and the
exit status is 2 where the config or the input is wrong, 1 where the run cannot go on. Here nothing starts Ray; disks
that fill up or turn read-only are in `tests/integration/test_faults.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray.config import load_config
from distill_ray.models import DEMO_MODEL_PATH
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.run import write_origin

Given = Callable[[Path], object]

CONFIG = """
name: mine
recipe: {type: context, context: {text: Answer.}, query: "{{ text }}"}
data: {source: rows.jsonl}
teacher: {type: fake}
"""
CHECK, GENERATE = "check config.yaml", "generate config.yaml --run-dir run"
CHECK_STUDENT = "check config.yaml --set student.model=./model"


# -- what is given -----------------------------------------------------------------------------------------------------


def file(name: str, content: str | bytes) -> Given:
    def write(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def folder(name: str) -> Given:
    return lambda here: (here / name).mkdir(parents=True)


def without(name: str) -> Given:
    return lambda here: (here / name).unlink()


def config(old: str, new: str) -> Given:
    return file("config.yaml", CONFIG.replace(old, new))


def more(text: str) -> Given:
    return file("config.yaml", CONFIG + text)


def rows(name: str, content: str | bytes) -> list[Given]:
    return [file(name, content), config("rows.jsonl", name)]


def parquet(num_rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"] * num_rows}), sink)
    return sink.getvalue()


def model(*changes: Given) -> list[Given]:
    return [lambda here: shutil.copytree(DEMO_MODEL_PATH, here / "model"), *changes]


def begun(*changes: Given) -> list[Given]:
    """A run folder in which something ran, and what became of it."""
    return [lambda here: write_origin(load_config(here / "config.yaml"), RunFolder(here / "run")), *changes]


def manifest(**changes: Any) -> list[Given]:
    return begun(lambda here: RunFolder(here / "run").update_manifest(changes))


def bad(what: str, command: str, *says: str, given: Given | list[Given] | None = None, status: int = 2) -> Any:
    """A line of the table. HERE in a message is the folder in which the command runs."""
    given = given if isinstance(given, list) else [given] if given is not None else []
    return pytest.param(given, command, says, status, id=what)


EXACT_MATCH = {"exact_match": 1.0, "exact_match_low": 1.0, "exact_match_high": 1.0}
METRICS = json.dumps(
    {"num_rows": 1, "student_after": EXACT_MATCH, "prompt_tokens_before": 2.0, "prompt_tokens_after": 1.0}
)

# -- the table ---------------------------------------------------------------------------------------------------------

CONFIGS = [
    bad("no config", CHECK, "config.yaml: cannot read the config (No such file", given=without("config.yaml")),
    bad("a folder for a config", "check run", "run: cannot read the config (Is a directory)", given=folder("run")),
    bad("an empty config", CHECK, "config.yaml: expected keys and values", given=file("config.yaml", "")),
    bad("a list", CHECK, "config.yaml: expected keys and values", "['a']", given=file("config.yaml", "- a")),
    bad("latin-1", CHECK, "config.yaml: not UTF-8 text (byte 9)", given=file("config.yaml", b"name: caf\xe9")),
    bad("binary junk", CHECK, "config.yaml: not valid YAML", "#x0000", given=file("config.yaml", b"\0\1\2")),
    bad("broken YAML", CHECK, "config.yaml: not valid YAML", "line 6", given=more("train: [1,")),
    bad("a date that there is not", CHECK, "config.yaml: not valid YAML: month", given=config("mine", "2024-13-41")),
    bad("a number too long", CHECK, "config.yaml: not valid YAML", "5000 digits", given=config("mine", "1" * 5000)),
    bad("nested too deeply", CHECK, "config.yaml: not valid YAML: nested", given=more("train: " + "[" * 3000)),
    bad("a tag that runs code", CHECK, "not valid YAML", "os.system", given=more("train: !!python/object:os.system x")),
    bad("half of an emoji", CHECK, "not valid YAML: half of", "line 3", given=config("Answer.", r'"\ud83d"')),
    bad("a key that is no text", CHECK, "config.yaml: 5: ", "(got 5)", given=more("5: 3")),
    bad("an unknown key", CHECK, "config.yaml: trian: unknown key", "did you mean `train`?", given=more("trian: {}")),
    bad("a wrong type", CHECK, "config.yaml: train.epochs: ", "(got 'many')", given=more("train: {epochs: many}")),
    bad("no data", CHECK, "config.yaml: data: missing; add it", given=config("data: {source: rows.jsonl}", "")),
    bad("an unknown recipe", CHECK, "recipe.type: unknown (got 'contxt'); did you mean",
        given=config("context,", "contxt,")),
    bad("an unknown engine", CHECK, "teacher.type: unknown (got 'fkae'); did you mean", given=config("fake", "fkae")),
    bad("a regex that does not compile", CHECK, "recipe.parse.regex: not a regular expression", "(got '(')",
        given=config("query:", "parse: {regex: '('}, query:")),
    bad("a template's syntax", CHECK, "recipe.query: not a valid template", "(got '{{ text')",
        given=config("{{ text }}", "{{ text")),
    bad("a column that there is not", CHECK, "recipe.query: unknown column `txt`; data.source has: text",
        given=config("{{ text }}", "{{ txt }}")),
    bad("no context file", CHECK, "recipe.context.file: HERE/rules.md: no such file; HERE has:",
        given=config("text: Answer.", "file: rules.md")),
    bad("a context nowhere", CHECK, "recipe.context.file: zzz://rules.md: cannot open this location",
        given=config("text: Answer.", "file: 'zzz://rules.md'")),
    bad("a context with a NUL in its name", CHECK, "recipe.context.file: ", "no name of a file",
        given=config("text: Answer.", r'file: "a\0b"')),
    bad("a folder for a context", CHECK, "recipe.context.file: HERE/rules: cannot read it (Is a directory)",
        given=[folder("rules"), config("text: Answer.", "file: rules")]),
    bad("--set without a value", f"{CHECK} --set train.epochs", "--set train.epochs: expected dotted.key=value"),
]  # fmt: skip

DATA = [
    bad("no file", CHECK, "data.source: HERE/rows.jsonl: no such file", given=without("rows.jsonl")),
    bad("a glob without a match", GENERATE, "data.source: HERE/x*.jsonl: no file matches this glob",
        given=config("rows.jsonl", "x*.jsonl")),
    bad("a name too long", CHECK, "data.source: ", "no such file", given=config("rows.jsonl", "x" * 300 + ".jsonl")),
    bad("a home that there is not", CHECK, "data.source: HERE/~nobody-here/r.jsonl: no such file",
        given=config("rows.jsonl", "~nobody-here/r.jsonl")),
    bad("a link to itself", CHECK, "data.source: HERE/loop.jsonl: no such file",
        given=[lambda here: (here / "loop.jsonl").symlink_to("loop.jsonl"), config("rows.jsonl", "loop.jsonl")]),
    bad("a folder without data", CHECK, "data.source: HERE/empty: no data file in this folder", ".jsonl",
        given=[folder("empty"), config("rows.jsonl", "empty")]),
    bad("an empty file", GENERATE, "HERE/rows.jsonl: no rows in this file", given=file("rows.jsonl", ""), status=1),
    bad("no rows", GENERATE, "HERE/r.csv: no rows in this file", given=rows("r.csv", "text\n"), status=1),
    bad("a table without rows", GENERATE, "data.source: HERE/r.parquet has no rows",
        given=rows("r.parquet", parquet(0)), status=1),
    bad("bytes that are no text", GENERATE, "HERE/rows.jsonl: not utf-8 text (byte 0 is 0xff)", "data.encoding",
        given=file("rows.jsonl", b"\xff\xfe" * 50)),
    bad("bytes that are no JSON", GENERATE, "HERE/rows.jsonl: none of its 1 rows is readable", "data.format",
        given=file("rows.jsonl", b"\0" * 300), status=1),
    bad("JSON that is no rows", GENERATE, "HERE/rows.jsonl: none of its 2 rows is readable", "not a JSON object",
        given=file("rows.jsonl", "[1]\n17\n"), status=1),
    bad("JSON nested too deeply", GENERATE, "HERE/rows.jsonl: none of its 1 rows is readable", "recursion",
        given=file("rows.jsonl", '{"text": ' + "[" * 100_000 + "\n"), status=1),
    bad("a broken array", GENERATE, "HERE/r.json: broken JSON array after element 1",
        given=rows("r.json", '[{"text": "a"}, {"te')),
    bad("wrong numbers of fields", GENERATE, "HERE/r.csv: none of its 1 rows is readable", "3 fields, the header has 2",
        given=rows("r.csv", "id,text\n1,a,b\n"), status=1),
    bad("a column twice", GENERATE, "HERE/r.csv: the first line has 'text' twice",
        given=rows("r.csv", "text,text\na,b\n")),
    bad("half a table", GENERATE, "HERE/r.parquet: cannot be read as parquet", "cut off",
        given=rows("r.parquet", parquet(100)[:-40])),
    bad("a table damaged inside", GENERATE, "HERE/r.parquet: cannot be read as parquet", "write it again",
        given=rows("r.parquet", parquet(100)[:20] + b"x" * 30 + parquet(100)[50:])),
    bad("half of gzip", GENERATE, "HERE/r.jsonl.gz: cannot be read",
        given=rows("r.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-6])),
    bad("an ending that nobody knows", GENERATE, "data.source: HERE/r.xyz: unknown ending", "data.format",
        given=rows("r.xyz", "a")),
    bad("values of all types", CHECK, "data: none of the 3 first rows can be used", "column `text` is a number (1)",
        given=file("rows.jsonl", '{"text": 1}\n{"text": null}\n{"text": [1]}\n')),
    bad("a huge line in vain", CHECK, "recipe.query: unknown column `text`; data.source has: x",
        given=file("rows.jsonl", json.dumps({"x": "y" * 5_000_000}) + "\n")),
]  # fmt: skip

MODELS = [
    bad("no model", CHECK_STUDENT, "student.model: no model at HERE/model; give an existing folder"),
    bad("a file for a model", CHECK_STUDENT, "student.model: no model at HERE/model", given=file("model", "x")),
    bad("no config.json", CHECK_STUDENT, "student.model: HERE/model has no config.json",
        given=model(without("model/config.json"))),
    bad("a config.json that is no JSON", CHECK_STUDENT, "student.model: cannot load HERE/model (",
        "fetch the model again",
        given=model(file("model/config.json", "{"))),
    bad("a config.json of nobody", CHECK_STUDENT, "student.model: cannot load HERE/model (", "`zzz`",
        given=model(file("model/config.json", '{"model_type": "zzz"}'))),
    bad("a config.json with nonsense", CHECK_STUDENT, "student.model: cannot load HERE/model (", "'hidden_size'",
        given=model(file("model/config.json", '{"model_type": "llama", "hidden_size": "big"}'))),
    bad("no tokenizer", CHECK_STUDENT, "student.model: cannot load a tokenizer from HERE/model (",
        given=model(without("model/tokenizer.json"))),
    bad("a damaged tokenizer", CHECK_STUDENT, "student.model: cannot load a tokenizer from HERE/model (",
        "mend that file",
        given=model(file("model/tokenizer.json", "{}"))),
    bad("no chat template", CHECK_STUDENT, "student.model: HERE/model has no chat template", "chat_template: FILE",
        given=model(without("model/chat_template.jinja"))),
    bad("a chat template that is none", CHECK_STUDENT, "student.model: HERE/model: its chat template does not work",
        given=model(file("model/chat_template.jinja", "{% for"))),
    bad("a chat template that fails", CHECK_STUDENT, "HERE/model: its chat template does not work (ZeroDivisionError",
        given=model(file("model/chat_template.jinja", "{{ 1 / 0 }}"))),
    bad("pickled weights", CHECK_STUDENT, "student.model: HERE/model has no weights in safetensors", "save_pretrained",
        given=model(lambda here: (here / "model/model.safetensors").rename(here / "model/pytorch_model.bin"))),
    bad("half of the weights", CHECK_STUDENT, "student.model: HERE/model/model.safetensors: damaged",
        "fetch the model again",
        given=model(file("model/model.safetensors", (DEMO_MODEL_PATH / "model.safetensors").read_bytes()[:5000]))),
]  # fmt: skip

OTHER = "--set name=other"
FOLDERS = [
    bad("a file for a folder", GENERATE, "HERE/run: cannot use this run folder (it is a file)",
        given=file("run", ""), status=1),
    bad("a folder below a file", f"{GENERATE}/below", "HERE/run/below: cannot use this run folder",
        given=file("run", ""), status=1),
    bad("another run's folder", f"{GENERATE} {OTHER}", "HERE/run: holds the run `mine` (recipe context)", "of `other`",
        "take another --run-dir", "--set name=mine",
        given=begun()),
    bad("another recipe's folder", GENERATE, "HERE/run: holds the run `mine` (recipe context)",
        "(recipe self_critique)", "take another --run-dir",
        given=begun(config("type: context, context: {text: Answer.}", "type: self_critique, reward: {type: length}"))),
    bad("training into another run's folder", f"train config.yaml --run-dir run {OTHER}", "holds the run `mine`",
        given=begun()),
    bad("a newer version's folder", GENERATE,
        "HERE/run: was written by a newer distill-ray (format 2; this one reads 1): upgrade, or take another --run-dir",
        given=manifest(format=2), status=1),
    bad("a report of a newer version's run", "report run", "a newer distill-ray (format 2",
        given=[*manifest(format=2), file("run/eval/metrics.json", "{}")], status=1),
    bad("an older version's folder", GENERATE,
        "HERE/run: was written by another distill-ray (format 0; this one reads 1): go on with that version, or take",
        given=manifest(format=0), status=1),
    bad("an older version's examples", "export run out.jsonl",
        "HERE/run/examples/00000.parquet: damaged (no column completion, example_id,",
        "another version of distill-ray",
        given=begun(file("run/examples/00000.parquet", parquet(3))), status=1),
    bad("a damaged manifest", GENERATE, "HERE/run/manifest.json: not valid JSON", "delete it and run again",
        given=begun(file("run/manifest.json", "{")), status=1),
    bad("a folder for a manifest", GENERATE, "HERE/run: cannot use this run folder", "Is a directory", "manifest.json",
        given=begun(without("run/manifest.json"), folder("run/manifest.json")), status=1),
    bad("a damaged config of the run", "ask run Hello?", "HERE/run/config.yaml: damaged",
        "run the command that wrote it",
        given=begun(file("run/config.yaml", "a: ["), folder("run/student")), status=1),
    bad("an empty config of the run", GENERATE, "HERE/run/config.yaml: damaged",
        given=begun(file("run/config.yaml", "")), status=1),
    bad("a damaged plan", GENERATE, "HERE/run/rows/plan.json: not valid JSON",
        given=begun(file("run/rows/plan.json", "{")), status=1),
    bad("damaged examples", "export run out.jsonl", "HERE/run/examples/00000.parquet: damaged", "delete it and run",
        given=begun(file("run/examples/00000.parquet", "PAR1")), status=1),
    bad("damaged figures", "report run", "HERE/run/eval/metrics.json: not valid JSON",
        given=begun(file("run/eval/metrics.json", "{")), status=1),
    bad("a file for the logs", GENERATE, "HERE/run/logs/driver.log: cannot write", "then run the same command again",
        given=begun(file("run/logs", "")), status=1),
    bad("a file for the rows", GENERATE, "HERE/run/rows/plan.json: cannot write",
        given=begun(file("run/rows", "")), status=1),
    bad("a report of no run", "report run", "run: not a run folder (no config.yaml)"),
    bad("figures without their keys", "report run", "HERE/run/eval/metrics.json: damaged",
        given=begun(file("run/eval/metrics.json", "{}")), status=1),
    bad("a report too early", "report run", "run: not evaluated yet", "run `distill-ray evaluate CONFIG --run-dir run`",
        given=begun(), status=1),
    bad("a page without its rows", "report run", "HERE/run/eval/predictions.parquet: missing", "evaluate` again",
        given=begun(file("run/eval/metrics.json", METRICS)), status=1),
    bad("a run without its manifest", "report run", "run: its manifest.json is gone",
        given=begun(without("run/manifest.json"))),
    bad("a run against itself under another name", "report run ./run", "run was named twice", given=begun()),
    bad("a comparison into a run", "report run other --out run/report.html", "run is a run's own folder",
        given=begun()),
    bad("a run against itself", "report run run", "run was named twice; name another run", given=begun()),
    bad("a page for one run", "report run --out page.html", "the page of one is its report.html", given=begun()),
    bad("a question too early", "ask run Hello?", "HERE/run: no student here yet; run `distill-ray train`",
        given=begun(), status=1),
    bad("a student without files", "ask run Hello?", "HERE/run/student has no config.json",
        given=begun(folder("run/student"))),
    bad("an export too early", "export run out.jsonl", "no example of train; run `distill-ray generate` first",
        given=begun(), status=1),
    bad("an export over a file", "export run rows.jsonl", "rows.jsonl: is there already; give another name",
        given=begun()),
    bad("an export below a file", "export run rows.jsonl/a.jsonl", "rows.jsonl/a.jsonl: cannot write it",
        given=begun(), status=1),
    bad("a calibration too early", "calibrate run", "HERE/run: no student here yet; run `distill-ray train",
        given=begun(), status=1),
    bad("a training too early", "train config.yaml --run-dir run",
        "examples/ is empty; run `distill-ray generate` first", status=1),
    bad("an evaluation too early", "evaluate config.yaml --run-dir run", "HERE/run: no student here yet", status=1),
    bad("an estimate from no run", "plan config.yaml --run-dir run", "run: not a run folder"),
    bad("an estimate below a file", "plan config.yaml --json rows.jsonl/x", "--json rows.jsonl/x: cannot write it"),
    bad("a starter below a file", "init rows.jsonl/config.yaml", "rows.jsonl/config.yaml: cannot write it"),
    bad("the demo below a file", "demo --run-dir rows.jsonl/x --rows 60", "rows.jsonl/x: cannot write here", status=1),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good config with good rows, in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return tmp_path


def contents(here: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("given", "command", "says", "status"), [*CONFIGS, *DATA, *MODELS, *FOLDERS])
def test_what_cannot_be_used_is_one_message(
    given: list[Given], command: str, says: tuple[str, ...], status: int, here: Path, run: Any
) -> None:
    for change in given:
        change(here)
    before = contents(here)
    found, output = run(*command.split())
    assert (found, output.count("error: ")) == (status, 1), output
    for part in says:
        assert part.replace("HERE", str(here)) in output, output
    assert not re.search(r"Traceback|bug in distill-ray", output)
    assert before.items() <= contents(here).items()


def test_a_second_run_on_a_folder_is_refused_with_the_first_ones_process_and_start(here: Path, run: Any) -> None:
    hold = "import sys; from distill_ray.pipeline.lock import take; f = take('run/.lock'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        status, output = run(*GENERATE.split())
        first.communicate(b"\n")
    assert status == 1
    assert re.search(
        rf"HERE/run: another run is at work here \(pid {first.pid} on \S+, started 20\S+\); wait for it, end it, or "
        r"take another --run-dir".replace("HERE", re.escape(str(here))),
        output,
    )
    assert not (here / "run" / "config.yaml").exists()
