"""What a cycle cannot do anything with: each ends in a clear message, and the service stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from rich.console import Console

from distill_ray.config import LoraConfig, RunConfig, StudentConfig, parse_config
from distill_ray.config.flywheel import FlywheelConfig
from distill_ray.errors import BundleError, ConfigError, DataError, FlywheelError, StoreError
from distill_ray.flywheel import cycle as machine
from distill_ray.flywheel.cycle import Ended, run_cycle
from distill_ray.flywheel.cycles import Cycles
from distill_ray.flywheel.preflight import check_flywheel, shadow_shows
from distill_ray.flywheel.promotion import student_problem
from distill_ray.flywheel.status import show_status
from distill_ray.flywheel.students import student_to_train
from distill_ray.flywheel.work import Work
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.store.lance import LanceStore
from distill_ray.serving.names import existing_service_folder
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.manifest import StudentSpec
from tests.unit.pair_maker import pair
from tests.unit.small_bundle import write_small_bundle
from tests.unit.test_cycle import RAW
from tests.unit.test_splitting import text

A = "a" * 12
EASY: dict[str, Any] = {"error_budget": 0.5, "confidence": 0.6}  # a threshold takes four


class Reached(Exception):
    """The cycle got as far as training."""


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(work: Work) -> dict[str, Any]:
        raise Reached

    monkeypatch.setitem(machine._DO, "train", train)
    monkeypatch.setattr(machine, "connected", contextlib.nullcontext)


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A service in which a bundle serves."""
    folder = tmp_path / "service"
    bundles = Bundles(folder / "bundles")
    bundles.promote(bundles.install(write_small_bundle(tmp_path / A, version=A)))
    return folder


def run(service: Path, pairs: list[Pair], **flywheel: Any) -> Ended:
    LanceStore(str(service / "pairs"), "pairs").add(pairs)
    return run_with(service, {"calibrate": EASY, "flywheel": {"min_pairs": 20, "gate": {"min_pairs": 4}, **flywheel}})


def run_with(service: Path, sections: dict[str, Any], *, again: bool = False) -> Ended:
    try:
        return run_cycle(parse_config({**RAW, **sections}), str(service), again=again)
    finally:
        assert Bundles(service / "bundles").versions() == [A]


def questions(count: int, **changes: Any) -> list[Pair]:
    return [pair(text(number), f"answer {number % 3}", **changes) for number in range(count)]


def test_enough_good_pairs_get_as_far_as_training(service: Path) -> None:
    with pytest.raises(Reached):
        run(service, questions(40))


@pytest.mark.parametrize(
    ("pairs", "flywheel", "why"),
    [
        ([], {}, "0 new pairs, and a cycle takes 20 (flywheel.min_pairs)"),
        (questions(12), {}, "12 new pairs, and a cycle takes 20 (flywheel.min_pairs)"),
        (
            [dataclasses.replace(pair("the same"), pair_id=f"{n:032x}") for n in range(30)],
            {},
            "1 of 30 pairs are left after cleaning (duplicate 29), less than half of flywheel.min_pairs (20); "
            "see dropped.parquet",
        ),
        (
            [dataclasses.replace(each, completion="", tool_calls="[]") for each in questions(30)],
            {},
            "0 of 30 pairs are left after cleaning (tools 30), less than half of flywheel.min_pairs (20); "
            "see dropped.parquet",
        ),
        (
            [dataclasses.replace(each, completion=" ") for each in questions(30)],
            {},
            "0 of 30 pairs are left after cleaning (no_answer 30), less than half of flywheel.min_pairs (20); "
            "see dropped.parquet",
        ),
        (
            questions(40),
            {"clean": {"min_owners": 2}},
            "the pairs come from 1 owners, and flywheel.clean.min_owners is 2: so few shall not say what "
            "everybody's student learns",
        ),
        (
            questions(40),
            {"holdout": 0.0001},
            "no pair is held out, so nothing would show how good a candidate is; raise flywheel.holdout",
        ),
    ],
)
def test_pairs_of_which_nothing_can_be_learnt_end_the_cycle_with_the_reason(
    service: Path, pairs: list[Pair], flywheel: dict[str, Any], why: str
) -> None:
    ended = run(service, pairs, **flywheel)
    assert (ended.outcome, ended.why) == ("too_few", [why])


# -- too few are held out ----------------------------------------------------------------------------------------------


def test_by_default_nothing_is_trained_that_could_not_be_promoted_and_more_pairs_change_that(service: Path) -> None:
    store = LanceStore(str(service / "pairs"), "pairs")
    store.add(questions(400))
    ended = run_with(service, {"flywheel": {"min_pairs": 400}})
    [why] = ended.why
    assert (ended.outcome, ended.step) == ("too_few", "split")
    held_out, more = (int(n) for n in re.findall(r"^(\d+) held-out requests .* about (\d+) more pairs", why)[0])
    assert why == (
        f"{held_out} held-out requests (near-duplicates count once): a verdict takes 100 (flywheel.gate.min_pairs), "
        "and a threshold about 118 (calibrate.error_budget 0.05 at calibrate.confidence 0.95). Nothing is trained yet; "
        f"wait for about {more} more pairs, or raise flywheel.holdout (0.2)"
    )
    assert 60 < held_out < 100
    assert more == pytest.approx((118 - held_out) / (held_out / 400), rel=0.1)
    assert run_with(service, {"flywheel": {"min_pairs": 400}}, again=True).outcome == "too_few"
    store.add(questions(400 + more + 50)[400:])
    with pytest.raises(Reached):
        run_with(service, {"flywheel": {"min_pairs": 400}})
    assert len(Cycles(service).all()) == 1


def test_the_pairs_that_a_new_cycle_begins_with_by_default_are_enough(service: Path) -> None:
    LanceStore(str(service / "pairs"), "pairs").add(questions(FlywheelConfig().min_pairs))
    with pytest.raises(Reached):
        run_with(service, {})


def test_what_was_held_out_by_earlier_cycles_counts(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclear(work: Work) -> dict[str, Any]:
        return {"outcome": "unclear", "why": ["because"], "current": None}

    with monkeypatch.context() as inner:
        inner.setitem(machine._DO, "train", unclear)
        run(service, questions(100), holdout=0.5)
    needs = {"calibrate": EASY, "flywheel": {"min_pairs": 20, "holdout": 0.1, "gate": {"min_pairs": 40}}}
    LanceStore(str(service / "pairs"), "pairs").add(questions(130)[100:])
    with pytest.raises(Reached):
        run_with(service, needs)


# -- said before anything is trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"flywheel": {"gate": {"regressions": "/nowhere.jsonl"}}},
            "flywheel.gate.regressions: /nowhere.jsonl: cannot",
        ),
        (
            {"recipe": {"type": "context", "context": {"column": "notes"}, "query": "{{ text }}"}},
            "recipe.context.column: notes: each row has a context of its own",
        ),
        (
            {"flywheel": {"trainer": {"type": "openai", "model": "m", "api_key_env": "NO_SUCH_KEY"}}},
            "flywheel.trainer.api_key_env: the environment variable NO_SUCH_KEY is not set",
        ),
        (
            {"calibrate": {"metric": "judge", "judge": {"type": "openai", "model": "m", "api_key_env": "NO_SUCH_KEY"}}},
            "calibrate.judge.api_key_env: the environment variable NO_SUCH_KEY is not set",
        ),
        (
            {"calibrate": {"max_pairs": 99}},
            "calibrate.max_pairs: 99, and a verdict takes 100 (flywheel.gate.min_pairs), so nothing would ever be "
            "promoted; give calibrate.max_pairs 100 or more",
        ),
        (
            {"calibrate": {"max_pairs": 110}},
            "calibrate.max_pairs: 110, and a threshold takes 118 (calibrate.error_budget 0.05 at calibrate.confidence "
            "0.95), so nothing would ever be promoted; give calibrate.max_pairs 118 or more",
        ),
        ({"flywheel": {"shadow": {"pairs": 50}}}, "flywheel.shadow.pairs: 50 answers, all of them good, do not show"),
    ],
)
def test_what_can_be_known_is_said_before_a_cycle_begins(service: Path, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        run_with(service, sections)
    assert Cycles(service).open().result("snapshot") is None


def test_all_that_is_wrong_is_said_at_once(service: Path) -> None:
    sections = {"calibrate": {"max_pairs": 99}, "flywheel": {"gate": {"regressions": "/nowhere.jsonl"}}}
    with pytest.raises(ConfigError, match=r"(?s)2 things are wrong.*regressions.*calibrate\.max_pairs"):
        run_with(service, sections)


def test_a_trial_of_the_least_length_that_is_named_can_end_well_and_a_shorter_one_cannot() -> None:
    with pytest.raises(ConfigError) as caught:
        list(check_flywheel(parse_config({**RAW, "flywheel": {"shadow": {"pairs": 20}}})))
    least = int(re.findall(r"give flywheel\.shadow\.pairs (\d+) or more", str(caught.value))[0])
    assert (shadow_shows(least, 0.05, 0.05), shadow_shows(least - 1, 0.05, 0.05)) == (True, False)
    list(check_flywheel(parse_config({**RAW, "flywheel": {"shadow": {"pairs": least}}})))


def test_a_trial_on_real_requests_without_a_service_is_refused_before_anything_is_trained(service: Path) -> None:
    with pytest.raises(FlywheelError, match=r"no service runs here, and flywheel\.shadow tries candidates"):
        run_with(service, {"flywheel": {"shadow": {}}})


def test_what_goes_away_while_pairs_are_cleaned_is_missed_before_training(
    service: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Hello?", "contains": "hello"}\n')

    split = machine._DO["split"]

    def unlinking(work: Work) -> dict[str, Any]:
        prompts.unlink()
        return split(work)

    monkeypatch.setitem(machine._DO, "split", unlinking)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl: cannot be read"):
        run(service, questions(40), gate={"min_pairs": 4, "regressions": str(prompts)})


def test_a_store_of_another_version_is_refused_by_name(service: Path) -> None:
    other = pa.table({"pair_id": ["x"], "text": ["of long ago"]})
    lance.write_dataset(other, str(service / "pairs" / "pairs.lance"))
    with pytest.raises(StoreError, match="written by another version of distill-ray"):
        run(service, [])


def test_an_address_at_which_nothing_was_stored_is_said_and_stays_as_it_is(service: Path) -> None:
    store = {"url": str(service / "nowhere")}
    config = parse_config({**RAW, "serve": {"collect": {"store": store}}})
    with pytest.raises(StoreError, match="nowhere: no pairs are stored there yet"):
        run_cycle(config, str(service))
    with pytest.raises(StoreError, match="nowhere: no pairs are stored there yet"):
        show_status(config, str(service), Console(file=io.StringIO(), width=400))
    assert [path.name for path in service.iterdir()] == ["bundles"]


def test_a_service_folder_in_the_copy_that_a_ray_job_works_in_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1a2b" / "services" / "mine"
    folder.parent.mkdir(parents=True)
    for _ in ("not there", "uploaded too"):
        with pytest.raises(
            ConfigError, match=r"is in the copy that Ray made .* --set serve\.folder=/shared/services/NAME"
        ):
            existing_service_folder(parse_config({**RAW, "serve": {"folder": str(folder)}}))
        folder.mkdir(exist_ok=True)
    (tmp_path / "shared").mkdir()
    outside = parse_config({**RAW, "serve": {"folder": str(tmp_path / "shared")}})
    assert existing_service_folder(outside) == str(tmp_path / "shared")


def test_an_evaluation_file_that_is_not_there_stops_before_anything_is_trained(service: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(service, questions(40), evaluation=[str(service / "nowhere.jsonl")])


def test_a_clock_that_jumps_back_changes_nothing(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of the future beside pairs of the past: none is new or old by its time."""
    now = time.time_ns()
    odd = [dataclasses.replace(each, created=now + (-1) ** n * n * 10**15) for n, each in enumerate(questions(40))]
    with pytest.raises(Reached):
        run(service, odd)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    monkeypatch.setattr(time, "time", lambda: 1e-9)
    with pytest.raises(Reached):
        run(service, [dataclasses.replace(each, created=0) for each in questions(60)[40:]])


@pytest.mark.parametrize("step", ["bundle", "promote"])
def test_a_full_disk_stops_the_step_and_the_same_command_goes_on(
    service: Path, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(work: Work) -> dict[str, Any]:
        raise BundleError("bundle: cannot write the bundle (No space left on device); check the disk's space")

    def fine(outcome: str) -> Callable[[Work], dict[str, Any]]:
        return lambda work: {"outcome": outcome, "current": A}

    for name in ("train", "gate", "bundle", "shadow"):
        monkeypatch.setitem(machine._DO, name, fine("go_on"))
    monkeypatch.setattr(machine, "write_gate_page", lambda *_: None)
    monkeypatch.setitem(machine._DO, "promote", fine("promoted"))
    with monkeypatch.context() as inner:
        inner.setitem(machine._DO, step, full)
        with pytest.raises(BundleError, match="No space left"):
            run(service, questions(40))
    assert run(service, []).outcome == "promoted"


def config(**student: Any) -> RunConfig:
    return parse_config({**RAW, "student": student})


def test_another_base_model_than_the_adapters_in_service_have_is_named(tmp_path: Path) -> None:
    spec = StudentSpec(
        kind="adapter", base="org/small", revision="r1", sampling=parse_config(RAW).teacher.sampling, control_tokens=[]
    )
    bundle = write_small_bundle(tmp_path / A, version=A, student=spec)
    with pytest.raises(
        ConfigError, match=r"org/other@main, and the student in service has its adapters on org/small@r1"
    ):
        student_to_train(config(model="org/other"), bundle)
    same = student_to_train(config(model="org/small", revision="r1"), bundle)
    assert same == StudentConfig(
        model="org/small", revision="r1", adapter=str(bundle / "student"), lora=LoraConfig(), chat_template_kwargs={}
    )
    anew = config(model="org/other").model_copy(update={"flywheel": FlywheelConfig(start_from="base")})
    assert student_to_train(anew, bundle) == StudentConfig(model="org/other", lora=LoraConfig())


def test_adapters_on_a_student_of_all_weights_are_merged_so_that_its_bundle_stands_alone(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / A, version=A)
    found = student_to_train(config(model="org/small"), bundle)
    assert found.model == str(bundle / "student")
    assert found.lora == LoraConfig(merge=True)
    assert student_to_train(config(model="org/small"), None).lora == LoraConfig()


def test_what_the_service_says_of_its_students_is_read_or_refused(tmp_path: Path) -> None:
    assert student_problem(tmp_path, A) is None
    states = {A: {"state": "failed", "why": "no weights"}}
    (tmp_path / "students.json").write_text(json.dumps({"time": 1, "students": states}))
    assert student_problem(tmp_path, A) == "its student does not start: no weights"
    (tmp_path / "students.json").write_text("{")
    with pytest.raises(FlywheelError, match=r"students\.json: damaged"):
        student_problem(tmp_path, A)
