"""Whole cycles on the real store, trainer, engine and embedder: promoted, gone on from, refused, gone back from."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clusters import Node, fixed
from benchmarks.flywheel_kills import World
from benchmarks.two_languages import FLIPPED, config_of, pairs
from distill_ray.config import RunConfig, load_config
from distill_ray.flywheel.cycle import Ended, run_cycle
from distill_ray.flywheel.cycles import STEPS, Cycles
from distill_ray.serving.collecting.marks import learnt_pairs, settle
from distill_ray.serving.collecting.store import PairStore, Selection
from distill_ray.serving.routing.bundle import load_bundle
from distill_ray.serving.routing.bundles import Bundles

pytestmark = pytest.mark.usefixtures("local_ray", "embedder_cache")


@dataclass
class Story:
    """What happened, one cycle after the other."""

    config: RunConfig
    service: Path
    store: PairStore
    bundles: Bundles
    first: Ended
    second: Ended
    poisoned: Ended
    killed: list[str]
    """What was wrong after one of the first cycle's kills."""

    late: set[str]
    """Ids of pairs that came while the first cycle was on."""

    marks_after: dict[str, dict[str, str]]

    def result(self, number: int, step: Any) -> dict[str, Any]:
        return Cycles(self.service).all()[number - 1].needed(step)

    def used(self, number: int) -> dict[str, str]:
        table = Cycles(self.service).all()[number - 1].files.read_table("split.parquet")
        return dict(zip(table["pair_id"].to_pylist(), table["split"].to_pylist(), strict=True))


def marks(store: PairStore) -> dict[str, str]:
    batches = store.scan(Selection(indexed=True), ["pair_id", "indexed_by"])
    return {record["pair_id"]: record["indexed_by"] for batch in batches for record in batch.to_pylist()}


def killed_again_and_again(world: World) -> list[str]:
    """The first cycle as a process: killed -9 at two moments, and begun again each time. Returns what was wrong then.

    `make flywheel-kills` does it at every step and at any moment.
    """
    run = world.service / "cycles" / "0001" / "run"
    moments = (
        lambda: any(run.glob("checkpoints/*/checkpoint_manager_snapshot.json")),  # it trains
        lambda: world.bundles.current() is not None,  # it is promoted, and its pairs are not marked
    )
    problems = []
    # Not the tests' Ray: what killed drivers have asked its autoscaler for counts for minutes.
    with tempfile.TemporaryDirectory(prefix="fk", dir="/tmp") as scratch, fixed(Path(scratch), Node(cpus=4)):
        for number, moment in enumerate(moments):
            assert world.killed(moment), f"over before kill {number + 1}"
            problems += world.problems()
            world.add(pairs(10, seed=90 + number), begun=1)
        world.finish()
    return problems + world.problems()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, local_ray: None, embedder_cache: Path) -> Story:
    folder = tmp_path_factory.mktemp("flywheel")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"text": "Wo ist der Bahnhof?", "equals": "de"}\n')
    world = World(config_of(folder))
    config, service, store, bundles = load_config(world.config), world.service, world.store, world.bundles
    marks_after = {}
    world.add(pairs(360, seed=1))
    killed = killed_again_and_again(world)
    cycle = Cycles(service).all()[0]
    last = cycle.needed("promote")
    first = Ended(1, last["outcome"], last["step"], [], cycle.folder, last["version"])
    marks_after["first"] = marks(store)
    store.add(pairs(300, seed=2))
    merged = ["flywheel.lora={rank: 8}", f"flywheel.gate.regressions={prompts}", "train.learning_rate=1e-3"]
    second = run_cycle(load_config(folder / "config.yaml", merged), str(service))
    marks_after["second"] = marks(store)
    store.add(pairs(300, seed=3, names=FLIPPED))
    poisoned = run_cycle(config, str(service))
    marks_after["poisoned"] = marks(store)
    return Story(config, service, store, bundles, first, second, poisoned, killed, world.late[1], marks_after)


def test_a_first_student_is_promoted_out_of_nothing(story: Story) -> None:
    assert (story.first.outcome, story.first.why) == ("promoted", [])
    version = story.first.version
    assert version == story.bundles.history()[0].version
    bundle = load_bundle(story.bundles.path(str(version)), None)
    assert bundle.manifest.threshold <= 1
    assert bundle.manifest.summary["share"] > 0.5
    assert {"gate.json", "calibration.json"} <= bundle.manifest.files.keys()


def test_two_kills_of_its_cycle_lost_nothing_and_marked_nothing_early(story: Story) -> None:
    assert not story.killed


def test_its_index_is_what_it_learnt_in_clusters_that_passed_and_that_is_marked(story: Story) -> None:
    used = story.used(1)
    learnt = set(learnt_pairs(story.bundles.path(str(story.first.version))))
    trained = {pair_id for pair_id, split in used.items() if split == "train"}
    assert learnt <= trained
    assert len(learnt) > 0.5 * len(trained)
    assert story.marks_after["first"] == dict.fromkeys(learnt, story.first.version)


def test_pairs_that_arrive_meanwhile_wait_for_the_next_cycle(story: Story) -> None:
    assert len(story.late) >= 10
    assert not story.late & story.used(1).keys()
    assert story.late <= story.used(2).keys()
    arrived = {each.pair_id for each in [*pairs(360, 1), *pairs(300, 2), *pairs(300, 3)]}
    assert story.store.count() == len(arrived | story.late)


def test_the_next_student_goes_on_from_it_and_is_held_against_it(story: Story) -> None:
    assert (story.second.outcome, story.second.why) == ("promoted", [])
    trained, gate = story.result(2, "train"), story.result(2, "gate")
    assert trained["current"] == story.first.version
    assert trained["student"]["model"] == str(story.bundles.path(str(story.first.version)) / "student")
    assert trained["student"]["lora"]["merge"]
    assert gate["sets"]["all"]["low"] > -gate["margin"]
    assert gate["sets"]["earlier"]["pairs"] == Counter(story.used(1).values())["held_out"]
    assert gate["regressions"] == {"num": 1, "failed": []}
    counts = Counter(story.used(2).values())
    assert counts["replay"] == round(0.5 * story.result(2, "clean")["kept"])


def test_what_was_held_out_once_is_never_learnt(story: Story) -> None:
    held_out = {pair_id for pair_id, split in story.used(1).items() if split == "held_out"}
    assert held_out
    for number in (2, 3):
        learnt = {i for i, split in story.used(number).items() if split in ("train", "replay", "validation")}
        assert not held_out & learnt


def test_the_second_bundle_knows_what_the_first_one_learnt_and_marks_only_its_own(story: Story) -> None:
    first, second = (learnt_pairs(story.bundles.path(str(each.version))) for each in (story.first, story.second))
    assert len(set(first) & set(second)) > 0.5 * len(first)
    after = story.marks_after["second"]
    assert {i for i, version in after.items() if version == story.first.version} == set(first)
    assert {i for i, version in after.items() if version == story.second.version} == set(second) - set(first)


def test_a_poisoned_batch_is_refused_and_changes_nothing(story: Story) -> None:
    assert story.poisoned.outcome == "refused"
    assert any(reason.startswith("earlier: worse than the student in service") for reason in story.poisoned.why)
    assert story.bundles.current() == story.second.version
    assert story.marks_after["poisoned"] == story.marks_after["second"]
    page = (story.poisoned.folder / "gate.html").read_text(encoding="utf-8")
    assert "refused" in page.casefold()


def test_what_a_refused_cycle_learnt_is_set_aside(story: Story) -> None:
    ended = run_cycle(story.config, str(story.service))
    assert ended.outcome == "too_few"
    [why] = ended.why
    assert why.startswith("0 new pairs, and a cycle takes 200 (flywheel.min_pairs); ")
    assert f"{story.result(ended.number, 'snapshot')['set_aside']} are set aside" in why
    assert story.result(ended.number, "snapshot")["set_aside"] == len(story.used(3)) - len(
        [split for split in story.used(3).values() if split in ("earlier", "replay")]
    ) + sum(story.result(3, "clean")["dropped"].values())


def test_every_step_left_its_file_and_no_text_stayed_behind(story: Story) -> None:
    for number, last in ((1, "promote"), (2, "promote"), (3, "gate")):
        cycle = Cycles(story.service).all()[number - 1]
        assert all(cycle.result(step) for step in STEPS[: STEPS.index(last) + 1])
        assert not cycle.files.exists("pairs.parquet")
        assert not cycle.run.exists("examples")


def test_going_back_takes_the_marks_along(story: Story) -> None:
    story.bundles.rollback()
    settle(story.bundles, story.store)
    assert marks(story.store) == story.marks_after["first"]
    story.bundles.promote(str(story.second.version))
    settle(story.bundles, story.store)
    assert marks(story.store) == story.marks_after["second"]
