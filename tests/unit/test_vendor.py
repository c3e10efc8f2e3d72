"""A vendor's fine-tuning API trains: paid for once, however often the process dies; and what is said when it fails."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import queue
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.errors import ConfigError, DistillError, FlywheelError, TrainingError
from distill_ray.flywheel import vendor as steps
from distill_ray.flywheel import vendor_api
from distill_ray.flywheel.vendor_errors import without_texts
from tests.unit.scripted_server import Reply
from tests.unit.scripted_vendor import STATUSES, Meddle, ScriptedVendor, When, talks, tune, tune_and_perhaps_die

KEY = "sk-canary-0123456789"
WHOLE_RUN = [
    *("GET /files", "POST /files") * 2,
    *("GET /fine_tuning/jobs", "POST /fine_tuning/jobs"),
    *("GET /fine_tuning/jobs/ID",) * 3,
    *("GET /fine_tuning/jobs/ID/events", "GET /fine_tuning/jobs/ID") * 2,
]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every test has a key, and no log line holds it. Tries follow one another at once."""
    monkeypatch.setenv("TEST_API_KEY", KEY)
    monkeypatch.setattr(steps, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(vendor_api, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def state_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "vendor" / "state.json").read_text())


def fails(vendor: ScriptedVendor, root: Path, **config: Any) -> DistillError:
    """The error of a call, that holds neither the key nor the client's own error."""
    with pytest.raises(DistillError) as caught:
        tune(vendor.base_url, str(root), **config)
    shown = str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert "openai._" not in shown
    return caught.value


# -- one job -----------------------------------------------------------------------------------------------------------


def test_a_job_is_uploaded_made_waited_for_and_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"hyperparameters": {"n_epochs": 3}, "suffix": "mine", "extra_body": {"seed": 7}}
    with ScriptedVendor() as vendor:
        tuned = tune(vendor.base_url, str(tmp_path), said.append, **settings)
        assert vendor.routes == WHOLE_RUN
        monkeypatch.delenv("TEST_API_KEY")
        assert tune(vendor.base_url, str(tmp_path), said.append, **settings) == tuned
        assert vendor.routes == WHOLE_RUN
    assert (tuned.model, tuned.job, tuned.trained_tokens) == ("ft:small:ftjob-0", "ftjob-0", 1234)
    [train], [validation] = vendor.uploaded("train"), vendor.uploaded("validation")
    for file, expected in ((train, talks(12)), (validation, talks(3, "held out"))):
        assert [json.loads(line)["messages"] for line in file["content"].splitlines()] == expected
        assert file["purpose"] == "fine-tune"
    fingerprint = state_of(tmp_path)["fingerprint"]
    assert all(fingerprint in file["filename"] for file in (train, validation))
    assert (tmp_path / "vendor" / "train.jsonl").read_text() == train["content"]
    [body] = vendor.bodies
    assert body == {
        "model": "small",
        "training_file": train["id"],
        "validation_file": validation["id"],
        "suffix": "mine",
        "metadata": {"distill_ray": fingerprint},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        "seed": 7,
    }
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in vendor.headers)
    assert [line.partition(": ")[2] for line in said[2:]] == [
        f"small at {vendor.base_url}",
        "validating_files",
        "queued",
        "running, step 10 of 20, training loss 0.5",
        "succeeded, ft:small:ftjob-0, 1,234 tokens trained",
    ]
    assert said[0] == "uploaded train.jsonl (0.00 MiB): file-0"


def test_nothing_that_was_left_open_is_sent(tmp_path: Path) -> None:
    with ScriptedVendor() as vendor:
        tune(vendor.base_url, str(tmp_path), validation=[])
    assert vendor.bodies[0].keys() == {"model", "training_file", "metadata"}
    assert len(vendor.files) == 1


def test_ten_conversations_are_enough_and_nine_are_not_sent(tmp_path: Path) -> None:
    with ScriptedVendor() as vendor:
        error = fails(vendor, tmp_path, train=talks(9))
        assert isinstance(error, TrainingError)
        assert "9 conversations to train on, and a vendor takes 10 or more" in str(error)
        assert vendor.routes == []
        tune(vendor.base_url, str(tmp_path), train=talks(10))


def test_statuses_that_nobody_knows_are_waited_out(tmp_path: Path) -> None:
    said: list[str] = []
    with ScriptedVendor(["created", "paused", "running", "succeeded"]) as vendor:
        vendor.event_data = [None, "x", {"step": "one"}, {"step": 3}, {"step": 2, "total_steps": 9}]
        tune(vendor.base_url, str(tmp_path), said.append)
    assert said[3:6] == [
        "job ftjob-0: created",
        "job ftjob-0: paused, it goes on when it is resumed at the vendor",
        "job ftjob-0: running, step 3",
    ]


def test_a_vendor_without_events_trains_all_the_same(tmp_path: Path) -> None:
    def meddle(route: str, when: When) -> Reply | None:
        return Reply(404, {"error": {"message": "unknown"}}) if route.endswith("/events") else None

    said: list[str] = []
    with ScriptedVendor(meddle=meddle) as vendor:
        tune(vendor.base_url, str(tmp_path), said.append)
    assert "job ftjob-0: running" in said


# -- killed ------------------------------------------------------------------------------------------------------------


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.unit.scripted_vendor", "openai"])


def in_a_process(vendor: ScriptedVendor, root: Path, *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start a call in a process of its own."""
    process = FORK.Process(target=tune_and_perhaps_die, args=(vendor.base_url, str(root), *arguments))
    process.start()
    return process


def assert_paid_once(vendor: ScriptedVendor, root: Path) -> None:
    assert tune(vendor.base_url, str(root)).model == "ft:small:ftjob-0"
    assert len(vendor.jobs) == len(vendor.bodies) == 1
    assert len(vendor.uploaded("train")) == len(vendor.uploaded("validation")) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(len(WHOLE_RUN)), ids=lambda n: f"{n} {WHOLE_RUN[n].replace('/', ' ')}")
def test_killed_at_a_request_nothing_is_paid_twice(tmp_path: Path, nth: int, when: When) -> None:
    pid: queue.Queue[int] = queue.Queue()
    is_killed = threading.Event()

    def meddle(route: str, moment: When) -> Reply | None:
        if is_killed.is_set() or moment != when or len(vendor.routes) != nth + 1:
            return None
        is_killed.set()
        os.kill(pid.get(timeout=600), signal.SIGKILL)
        return Reply(close=True)

    with ScriptedVendor(meddle=meddle) as vendor:
        process = in_a_process(vendor, tmp_path)
        pid.put(process.pid or 0)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_paid_once(vendor, tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(6))
def test_killed_at_a_file_nothing_is_paid_twice(tmp_path: Path, nth: int, when: When) -> None:
    """Two files of conversations; their ids, the job's, the result."""
    with ScriptedVendor() as vendor:
        process = in_a_process(vendor, tmp_path, nth, when)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_paid_once(vendor, tmp_path)


def test_a_process_that_is_not_killed_ends_well(tmp_path: Path) -> None:
    """Else the tests above would say nothing."""
    with ScriptedVendor() as vendor:
        process = in_a_process(vendor, tmp_path, 6, "before")
        process.join()
        assert process.exitcode == 0
        num = len(vendor.routes)
        assert_paid_once(vendor, tmp_path)
        assert len(vendor.routes) == num


def test_a_run_whose_folder_was_lost_finds_its_job_again(tmp_path: Path) -> None:
    with ScriptedVendor() as vendor:
        for other in range(5):  # further pages
            tune(vendor.base_url, str(tmp_path / "others"), train=talks(20 + other))
        first = tune(vendor.base_url, str(tmp_path / "one"))
        for other in range(5):
            tune(vendor.base_url, str(tmp_path / "others"), train=talks(30 + other))
        assert tune(vendor.base_url, str(tmp_path / "two")) == first
    assert len(vendor.jobs) == 11


@pytest.mark.parametrize("page", [2, None])
def test_at_a_vendor_that_keeps_no_metadata_the_job_is_found_by_its_file(tmp_path: Path, page: int | None) -> None:
    with ScriptedVendor(keeps_metadata=False, page=page) as vendor:
        for other in range(3):
            tune(vendor.base_url, str(tmp_path / "others"), train=talks(20 + other))
        first = tune(vendor.base_url, str(tmp_path / "one"))
        assert tune(vendor.base_url, str(tmp_path / "two")) == first
        assert (len(vendor.jobs), len(vendor.uploaded("train"))) == (4, 4)
        tune(vendor.base_url, str(tmp_path / "two"), hyperparameters={"n_epochs": 1})
    assert len(vendor.jobs) == 5


# -- requests that fail ------------------------------------------------------------------------------------------------


def once_instead(route: str, when: When, instead: Reply) -> tuple[Meddle, list[str]]:
    """Meddles with the first request of a route; the list tells when that is done."""
    done: list[str] = []

    def meddle(asked: str, moment: When) -> Reply | None:
        if done or (asked, moment) != (route, when):
            return None
        done.append(asked)
        return instead

    return meddle, done


@pytest.mark.parametrize("route", sorted(set(WHOLE_RUN)))
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "instead",
    [
        Reply(429, {"error": {"message": "slow"}}, {"retry-after-ms": "1"}),
        Reply(500, "<html>oops</html>"),
        Reply(close=True),
        Reply(200, "<html>a proxy</html>", {"content-type": "text/html"}),
        Reply(200, "", {"content-type": "text/html"}),
        Reply(200, {}),
    ],
    ids=["429", "500", "close", "html", "empty", "other JSON"],
)
def test_what_may_pass_is_tried_again_and_nothing_is_made_twice(
    tmp_path: Path, route: str, when: When, instead: Reply
) -> None:
    meddle, done = once_instead(route, when, instead)
    # A list that is none is not tried again at once.
    passes = instead.status != 200 or instead.close or "ID" in route or route.startswith("POST")
    with ScriptedVendor(meddle=meddle) as vendor:
        if passes:
            tune(vendor.base_url, str(tmp_path))
        else:
            assert "no fine-tuning API's answer" in str(fails(vendor, tmp_path))
        assert done
        assert_paid_once(vendor, tmp_path)


@pytest.mark.parametrize("route", ["POST /files", "POST /fine_tuning/jobs", "GET /fine_tuning/jobs/ID"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_takes_too_long_is_tried_again_and_nothing_is_made_twice(tmp_path: Path, route: str, when: When) -> None:
    meddle, done = once_instead(route, when, Reply(body={}, hang_s=1.5))
    with ScriptedVendor(meddle=meddle) as vendor:
        tune(vendor.base_url, str(tmp_path), timeout_s=1.0)
        assert done
        assert_paid_once(vendor, tmp_path)


def test_a_vendor_that_stays_away_is_said_and_what_was_done_is_kept(tmp_path: Path) -> None:
    away = True

    def meddle(route: str, when: When) -> Reply | None:
        return Reply(503, {"error": {"message": "maintenance"}}) if away and route == "POST /fine_tuning/jobs" else None

    with ScriptedVendor(meddle=meddle) as vendor:
        error = fails(vendor, tmp_path)
        assert isinstance(error, FlywheelError)
        assert re.search(r"503 maintenance; run the same command again later", str(error))
        assert state_of(tmp_path)["files"] == {"train": "file-0", "validation": "file-1"}
        assert vendor.routes.count("POST /fine_tuning/jobs") == 3
        away = False
        assert_paid_once(vendor, tmp_path)


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with ScriptedVendor() as vendor:
        pass
    error = fails(vendor, tmp_path)
    assert isinstance(error, FlywheelError)
    assert "cannot reach http://127.0.0.1" in str(error)


def test_an_outage_while_the_job_runs_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 8

    def meddle(route: str, when: When) -> Reply | None:
        nonlocal left
        if route != "GET /fine_tuning/jobs/ID" or when == "after" or not left:
            return None
        left -= 1
        return Reply(500, {"error": {"message": "maintenance"}})

    monkeypatch.setattr(vendor_api, "RETRIES", 0)
    said: list[str] = []
    with ScriptedVendor(meddle=meddle) as vendor:
        tune(vendor.base_url, str(tmp_path), said.append)
        assert [line for line in said if "no news" in line] == [
            f"no news of the job ({vendor.base_url}: 500 maintenance); it is asked for again every 0.01 s"
        ]
        left = 10**9
        monkeypatch.setattr(steps, "PATIENCE_S", 0.05)
        error = fails(vendor, tmp_path, train=talks(13))
        assert isinstance(error, FlywheelError)
        assert "500 maintenance; run the same command again later: it goes on from here" in str(error)
        left = 0
        assert tune(vendor.base_url, str(tmp_path), train=talks(13)).job == "ftjob-1"
    assert len(vendor.jobs) == 2


# -- other data, other settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ({"train": talks(13)}, True),
        ({"train": talks(12)[::-1]}, True),
        ({"validation": []}, True),
        ({"model": "large"}, True),
        ({"hyperparameters": {"n_epochs": 1}}, True),
        ({"suffix": "b"}, True),
        ({"extra_body": {"seed": 1}}, True),
        ({"poll_s": 0.02}, False),
        ({"timeout_s": 9.0}, False),
        ({"api_key_env": None}, False),
    ],
    ids=str,
)
def test_a_job_is_another_where_the_model_would_be(tmp_path: Path, change: dict[str, Any], is_new: bool) -> None:
    with ScriptedVendor() as vendor:
        first = tune(vendor.base_url, str(tmp_path))
        second = tune(vendor.base_url, str(tmp_path), **change)
    assert (second != first, len(vendor.jobs)) == (is_new, 1 + is_new)


def test_a_job_that_is_overtaken_is_left_alone_and_named(tmp_path: Path) -> None:
    with ScriptedVendor(["running"]) as vendor:
        interrupted(vendor, tmp_path)
        vendor.statuses = ["succeeded"]
        said: list[str] = []
        tune(vendor.base_url, str(tmp_path), said.append, train=talks(13))
    assert said[0] == "conversations or settings have changed: the job ftjob-0 is left alone at the vendor"
    assert list(vendor.jobs) == ["ftjob-0", "ftjob-1"]


def interrupted(vendor: ScriptedVendor, root: Path, at: str = "running") -> list[str]:
    """A call that ends by Ctrl-C; what it said."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if at in line and "at the vendor" not in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(vendor.base_url, str(root), say)
    return said


def test_ctrl_c_leaves_the_job_at_the_vendor_and_says_so(tmp_path: Path) -> None:
    with ScriptedVendor() as vendor:
        assert "goes on" not in interrupted(vendor, tmp_path, at="uploaded")[-1]
        assert interrupted(vendor, tmp_path)[-1] == (
            "the job ftjob-0 goes on at the vendor; the same command waits for it (end it there, if you like)"
        )
        assert_paid_once(vendor, tmp_path)
    assert all(route.startswith("GET") or route in WHOLE_RUN for route in vendor.routes)


# -- jobs that end badly -----------------------------------------------------------------------------------------------


def test_a_job_that_failed_is_said_with_its_reason_and_the_next_run_makes_another(tmp_path: Path) -> None:
    error = {"code": "invalid_training_file", "message": "The file has 3 bad lines", "param": "training_file"}
    with ScriptedVendor(["running", "failed"], error=error) as vendor:
        failure = fails(vendor, tmp_path)
        assert isinstance(failure, TrainingError)
        assert str(failure) == (
            "the vendor's job ftjob-0 failed: The file has 3 bad lines (invalid_training_file, training_file). What "
            f"was uploaded is beside {tmp_path}/vendor/state.json; the same command makes a new job"
        )
        vendor.statuses = list(STATUSES)
        assert tune(vendor.base_url, str(tmp_path)).job == "ftjob-1"
    assert (len(vendor.jobs), len(vendor.files)) == (2, 2)


@pytest.mark.parametrize("error", [None, {}, {"message": None, "code": 5}, {"message": "", "code": "", "param": None}])
def test_a_job_that_failed_without_a_reason_says_that(tmp_path: Path, error: dict[str, Any] | None) -> None:
    with ScriptedVendor(["failed"], error=error) as vendor:
        assert re.search(r"ftjob-0 failed: (the vendor gives no reason| \(5\))\.", str(fails(vendor, tmp_path)))


def test_a_job_that_was_cancelled_says_so_and_the_next_run_makes_another(tmp_path: Path) -> None:
    with ScriptedVendor(["running", "cancelled"]) as vendor:
        assert "ftjob-0 was cancelled there" in str(fails(vendor, tmp_path))
        vendor.statuses = list(STATUSES)
        assert tune(vendor.base_url, str(tmp_path)).job == "ftjob-1"


def test_a_job_that_succeeded_without_a_model_is_looked_at_again(tmp_path: Path) -> None:
    with ScriptedVendor(["succeeded"]) as vendor:
        vendor._look = lambda job: Reply(body={**job, "status": "succeeded"})  # type: ignore[method-assign]
        assert "names no model yet" in str(fails(vendor, tmp_path))
        del vendor._look
        assert_paid_once(vendor, tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "status", "error", "kind", "says"),
    [
        (
            "GET /files",
            401,
            {"message": f"Incorrect API key provided: {KEY}"},
            ConfigError,
            r"^flywheel\.trainer\.api_key_env: .* 401 Incorrect API key provided: \*\*\*; the key in the environment "
            r"variable TEST_API_KEY is wrong",
        ),
        ("POST /files", 403, {"message": "no"}, ConfigError, r"^flywheel\.trainer\.api_key_env: .*may not fine-tune"),
        (
            "POST /fine_tuning/jobs",
            400,
            {
                "message": "Model small is not available for fine-tuning",
                "param": "model",
                "code": "model_not_available",
            },
            ConfigError,
            r"^flywheel\.trainer\.model: small cannot be fine-tuned with this account",
        ),
        ("POST /fine_tuning/jobs", 404, {"code": "model_not_found"}, ConfigError, r"^flywheel\.trainer\.model: small"),
        ("POST /fine_tuning/jobs", 404, {}, ConfigError, r"^flywheel\.trainer\.base_url: .*is there a fine-tuning API"),
        ("GET /fine_tuning/jobs/ID", 404, {}, ConfigError, r"delete /.*/vendor/state\.json to begin anew"),
        (
            "POST /fine_tuning/jobs",
            429,
            {"message": "quota", "code": "insufficient_quota"},
            FlywheelError,
            r"429 quota; the account behind TEST_API_KEY has no quota left",
        ),
        (
            "POST /fine_tuning/jobs",
            400,
            {"message": "n_epochs is too large", "param": "hyperparameters", "code": "invalid"},
            FlywheelError,
            r"400 n_epochs is too large \(hyperparameters, invalid\); see flywheel\.trainer",
        ),
    ],
)
def test_a_refusal_names_what_to_change(
    tmp_path: Path, route: str, status: int, error: dict[str, Any], kind: type[DistillError], says: str
) -> None:
    def meddle(asked: str, when: When) -> Reply | None:
        return Reply(status, {"error": error}) if asked == route else None

    with ScriptedVendor(meddle=meddle) as vendor:
        failure = fails(vendor, tmp_path)
    assert type(failure) is kind
    assert re.search(says, str(failure))
    assert vendor.jobs == {} or "/ID" in route


def test_a_missing_key_is_said_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_API_KEY")
    with ScriptedVendor() as vendor:
        failure = fails(vendor, tmp_path)
        assert isinstance(failure, ConfigError)
        assert "flywheel.trainer.api_key_env: the environment variable TEST_API_KEY is not set" in str(failure)
        assert vendor.routes == []
        tune(vendor.base_url, str(tmp_path), api_key_env=None)


def test_files_that_were_deleted_at_the_vendor_are_uploaded_again(tmp_path: Path) -> None:
    refuses = True

    def meddle(route: str, when: When) -> Reply | None:
        return Reply(503, "{}") if refuses and route == "POST /fine_tuning/jobs" else None

    with ScriptedVendor(meddle=meddle) as vendor:
        fails(vendor, tmp_path)
        vendor.files.clear()
        refuses = False
        assert "400 invalid training_file" in str(fails(vendor, tmp_path))
        assert_paid_once(vendor, tmp_path)


# -- nothing of the users ----------------------------------------------------------------------------------------------

SECRET = "Meet Ada at the old mill tonight"
QUOTES = [
    f"Line 3 is wrong: '{SECRET}'",
    f"Line 3 is wrong: {SECRET}",
    f"Line 3 is wrong: {SECRET.upper()} and so on",
    f'Line 3 is wrong: {{"messages": [{{"role": "user", "content": "{SECRET}"}}]}}',
    f'Line 3 is wrong: {{"messages": [{{"role": "user", "content": "{SECRET}',
    f"Line 3 is wrong: “{SECRET}” is not",
    f"Line 3 is wrong: `What's {SECRET[:20]}` is not",
    f"Line 3 is wrong: {SECRET[9:]}",
    f"Line 3 is wrong: {SECRET} " + "x" * 1000,
]


@pytest.mark.parametrize("message", QUOTES)
@pytest.mark.parametrize("how", ["job", "request", "busy"])
def test_what_users_said_is_in_no_error_line_or_log(
    tmp_path: Path, message: str, how: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def meddle(route: str, when: When) -> Reply | None:
        status = {"job": None, "request": 400, "busy": 503}[how]
        if status is None or route != "POST /fine_tuning/jobs":
            return None
        return Reply(status, {"error": {"message": message, "param": SECRET, "code": SECRET}})

    train = [*talks(11), [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "No."}]]
    error = {"message": message, "code": SECRET, "param": SECRET}
    with ScriptedVendor(["failed"], meddle=meddle, error=error) as vendor:
        failure = fails(vendor, tmp_path, train=train)
    shown = str(failure) + caplog.text + capsys.readouterr().out
    assert "Line 3 is wrong: …" in str(failure)
    assert not re.search(r"\bAda\b|old mill|tonight", shown, re.IGNORECASE)


WORDS = st.lists(
    st.text(st.characters(categories=["L", "N"], exclude_characters="qQ"), min_size=1, max_size=6),
    min_size=1,
    max_size=12,
)


@given(WORDS, WORDS, WORDS)
def test_of_a_text_that_a_message_quotes_nothing_is_left(before: list[str], text: list[str], behind: list[str]) -> None:
    said = without_texts(" ".join([*before, "qq", *text, "qq", *behind]), [" ".join(text)])
    assert said.split("qq")[1] == " … "


@given(WORDS)
def test_a_message_that_shares_nothing_with_the_texts_stays_as_it_is(words: list[str]) -> None:
    message = ", ".join(words) + "."
    assert without_texts(message, []) == message
    assert without_texts(message, ["", "_ _ _"]) == message
