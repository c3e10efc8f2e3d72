"""A teacher of several engines: who answers what, what the config refuses, and what else looks at the teacher."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import MixtureConfig, RunConfig, SamplingConfig, parse_config
from distill_ray.engines.fake import FakeEngine
from distill_ray.engines.mixture import Mixture
from distill_ray.errors import ConfigError, EngineUnavailable, TransientEngineError
from distill_ray.pipeline import worker
from distill_ray.pipeline.check import check_service, check_teacher
from distill_ray.pipeline.estimating.estimate import Estimate, estimate
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generation_fingerprint
from distill_ray.pipeline.members import Pool, PooledEngine
from distill_ray.pipeline.reporting.report import write_report
from distill_ray.pipeline.run import stored_config, write_origin
from distill_ray.pipeline.teacher import Teacher
from distill_ray.recipes import make_recipe
from distill_ray.records import Row
from tests.unit.test_worker import run_worker

KEYS = [f"key {i}".encode() for i in range(20_000)]


def fake(answer: str, weight: float = 1, **engine: Any) -> dict[str, Any]:
    return {"weight": weight, "engine": {"type": "fake", "answer": answer, **engine}}


def config_of(*members: dict[str, Any], where: Path | None = None, **keys: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": "queries.jsonl", "id": "id"},
        "teacher": {"type": "mixture", "members": list(members)},
        "student": {"model": "demo"},
    }
    for key, value in keys.items():
        raw[key] = {**raw.get(key, {}), **value}
    return parse_config(raw, base=where)


# -- who answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [(1.0,), (3.0, 1.0), (0.2, 0.2, 0.6), (1.0, 10.0, 100.0)],
    ids=lambda weights: ":".join(map(str, weights)),
)
def test_members_answer_in_proportion_to_their_weights(weights: tuple[float, ...]) -> None:
    mixture = Mixture([f"openai:model-{n}" for n in range(len(weights))], weights)
    counts = Counter(map(mixture.choose, KEYS))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        deviation = math.sqrt(len(KEYS) * share * (1 - share))
        assert abs(counts[number] - len(KEYS) * share) <= 4 * deviation


def test_the_choice_never_changes_or_rows_would_be_paid_again_after_an_update() -> None:
    mixture = Mixture(["openai:a", "vllm:b", "fake:c"], [3, 1, 1])
    assert "".join(str(mixture.choose(key)) for key in KEYS[:40]) == "0200220200000022101200100111000001101020"


identities = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=5)
weight = st.floats(0.01, 100)


@given(st.data(), identities)
def test_a_new_member_takes_keys_and_moves_none_between_the_others(data: st.DataObject, names: list[str]) -> None:
    weights = [data.draw(weight) for _ in names]
    before = Mixture(names, weights)
    after = Mixture([*names, data.draw(st.sampled_from(["d", "e"]))], [*weights, data.draw(weight)])
    for key in KEYS[:50]:
        assert after.choose(key) in (before.choose(key), len(names))


@given(st.data(), identities)
def test_a_new_weight_moves_keys_to_or_from_its_member_only(data: st.DataObject, names: list[str]) -> None:
    weights = [data.draw(weight) for _ in names]
    changed = data.draw(st.integers(0, len(names) - 1))
    new = [data.draw(weight) if n == changed else w for n, w in enumerate(weights)]
    before, after = Mixture(names, weights), Mixture(names, new)
    for key in KEYS[:50]:
        was, now = before.choose(key), after.choose(key)
        assert was == now or (now == changed if new[changed] > weights[changed] else was == changed)


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_members_means_nothing(order: list[str]) -> None:
    names = ["a", "b", "c", "d"]
    weights = dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True))
    first, other = Mixture(names, [weights[n] for n in names]), Mixture(order, [weights[n] for n in order])
    assert [names[first.choose(key)] for key in KEYS[:50]] == [order[other.choose(key)] for key in KEYS[:50]]


def test_one_model_at_two_servers_is_two_members() -> None:
    counts = Counter(map(Mixture(["openai:m", "openai:m"], [1, 1]).choose, KEYS))
    assert abs(counts[0] - counts[1]) < 4 * math.sqrt(len(KEYS))


def test_a_row_is_known_by_all_that_it_asks_first_and_not_by_the_examples_in_front_of_it() -> None:
    config = config_of(
        fake("a"), fake("b"), recipe={"examples": [{"query": "1 + 1", "answer": "2"}], "query": "{{ text }}"}
    )
    teacher, recipe = Teacher(config), make_recipe(config.recipe)
    rows = [Row(f"r{i}", "train", f"query {i}", {}) for i in range(100)]
    chosen = [teacher.of_row(recipe, row) for row in rows]
    assert set(chosen) == set(teacher.engines)
    assert [teacher.of_row(recipe, Row("other", "test", row.query, {})) for row in rows] == chosen


def test_a_row_without_its_context_has_somebody_who_answers() -> None:
    config = config_of(fake("a"), fake("b"), recipe={"context": {"column": "rules"}})
    teacher = Teacher(config)
    assert teacher.of_row(make_recipe(config.recipe), Row("r", "train", "query", {})) in teacher.engines


# -- a partition's worth of rows -------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(worker, "redirect_output", lambda folder, name: None)
    lines = [json.dumps({"id": f"r{i}", "text": f"query {i}"}) + "\n" for i in range(60)]
    (tmp_path / "queries.jsonl").write_text("".join(lines))
    return tmp_path


def answers(folder: RunFolder) -> dict[str, tuple[str, str]]:
    """row -> (completion, teacher)."""
    records = [r for table in folder.read_tables("examples") for r in table.to_pylist()]
    return {r["row_id"]: (r["completion"], r["teacher"]) for r in records}


def test_the_ledger_knows_answers_by_the_member_that_gave_them(rows: Path) -> None:
    folder = RunFolder(rows / "run")
    a, b = fake("a", 2, model="one"), fake("b", 1, model="two")
    assert run_worker(config_of(a, b, where=rows), folder).state()["calls"] == 60
    found = answers(folder)
    by_model = Counter((completion, model.partition("@")[0]) for completion, model in found.values())
    assert set(by_model) == {("a", "one"), ("b", "two")}
    # Alone, each is asked for what the other had answered, and its own answers are there.
    raw = config_of(a, b, where=rows).model_dump(mode="json")
    state = run_worker(parse_config({**raw, "teacher": a["engine"]}), folder).state()
    assert (state["calls"], state["replayed"]) == (by_model["b", "two"], by_model["a", "one"])


def test_changed_weights_and_more_members_pay_only_for_the_rows_that_move(rows: Path) -> None:
    folder = RunFolder(rows / "run")
    run_worker(config_of(fake("a", 2), fake("b", 1), where=rows), folder)
    before = answers(folder)
    for members in ([fake("b", 3), fake("a", 2)], [fake("c", 1), fake("a", 2), fake("b", 3)]):
        calls = run_worker(config_of(*members, where=rows), folder).state()["calls"]
        after = answers(folder)
        assert calls == sum(before[row] != after[row] for row in before) > 0
        before = after


def test_a_slow_member_keeps_no_row_of_another_waiting(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time for each; the slow one gives its first answer when the quick one has given all of its own."""
    config = config_of(fake("slow", max_concurrency=1), fake("quick", max_concurrency=1), where=rows)
    recipe, teacher = make_recipe(config.recipe), Teacher(config)
    chosen = [teacher.of_row(recipe, Row(f"r{i}", "train", f"query {i}", {})) for i in range(60)]
    quick, given = chosen.count(list(teacher.engines)[1]), 0
    answer = FakeEngine.generate

    async def in_order(self: FakeEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal given
        while self.config.answer == "slow" and given < quick:
            await asyncio.sleep(0.001)
        given += self.config.answer == "quick"
        return await answer(self, *args, **kwargs)

    monkeypatch.setattr(FakeEngine, "generate", in_order)
    assert run_worker(config, RunFolder(rows / "run"), together=True).state()["calls"] == 60


# -- in an actor -----------------------------------------------------------------------------------------------------


class Actor:
    """An `EngineActor` with Ray's calling convention and without Ray.

    Args:
        deaths: so many calls find that the process has died.
        starts: whether it ever comes up.
        failures: so many starts fail.
        slow: other replicas' starts have come to an end before its own does.
        refusals: so many starts are refused, as Ray is about to start its process again.
    """

    def __init__(
        self, deaths: int = 0, starts: bool = True, failures: int = 0, slow: bool = False, refusals: int = 0
    ) -> None:
        self.deaths, self.starts, self.failures, self.slow = deaths, starts, failures, slow
        self.refusals = refusals
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        actor = self

        class Method:
            @staticmethod
            def options(**_: Any) -> type[Method]:
                return Method

            @staticmethod
            async def remote(*args: Any) -> str:
                actor.asked.append(name)
                if name == "start" and not actor.starts:
                    await asyncio.Event().wait()
                if name == "start" and actor.slow:
                    await asyncio.sleep(0.01)
                if name == "start" and actor.refusals:
                    actor.refusals -= 1
                    raise ray.exceptions.ActorUnavailableError("IOError: The actor is restarting.", b"0" * 16)
                if name == "start" and actor.failures:
                    actor.failures -= 1
                    raise EngineUnavailable("no memory left")
                if name != "start" and actor.deaths:
                    actor.deaths -= 1
                    raise ray.exceptions.ActorDiedError()
                return "answer"

        return Method


class NeverStarts(Actor):
    """Its process dies whenever it is started."""

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__("generate")
        self.deaths = 1
        return method


def ask(*actors: Actor, number: int = 0) -> Any:
    """The answer of a member with these replicas to a row at the place `number`."""
    [config] = config_of(fake("a", max_retries=2)).teachers.values()

    async def answer() -> Any:
        engine = PooledEngine(Pool(config, actors, "member-0"), number)
        await engine.start()
        return await engine.generate([{"role": "user", "content": "x"}], SamplingConfig()), engine.num_retries

    return asyncio.run(asyncio.wait_for(answer(), 60))


def test_what_a_dying_process_was_asked_is_asked_again_and_may_pass_later_when_it_dies_too_often() -> None:
    frail = Actor(deaths=2)
    assert ask(frail) == ("answer", 2)
    assert frail.asked == ["start", "generate"] * 3  # it is waited for before it is asked again
    with pytest.raises(TransientEngineError, match=r"the member-0's process died .*see logs/"):
        ask(Actor(deaths=3))


def test_a_process_that_is_slow_to_come_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses what is asked meanwhile, at once: tries would be used up within milliseconds."""
    monkeypatch.setattr("distill_ray.pipeline.members.RESTART_S", 0.0)
    slow = Actor(deaths=1, refusals=50)
    assert ask(slow) == ("answer", 1)
    assert slow.asked == ["start"] * 51 + ["generate", "start", "generate"]


def test_another_replica_answers_for_one_that_dies_or_never_comes_up() -> None:
    steady, frail, missing = Actor(), Actor(deaths=1), Actor(starts=False)
    assert ask(steady, frail, number=1) == ("answer", 1)
    assert steady.asked.count("generate") == frail.asked.count("generate") == 1
    assert ask(steady, missing, number=1) == ("answer", 0)
    assert "generate" not in missing.asked


def test_a_member_that_cannot_start_ends_the_run() -> None:
    with pytest.raises(EngineUnavailable, match="the member-0's process died"):
        ask(NeverStarts())


def test_a_replica_that_cannot_start_ends_nothing_while_another_one_loads_and_is_tried_again() -> None:
    assert ask(NeverStarts(), Actor(slow=True)) == ("answer", 0)
    # When the one that is up dies, the other one's failure is long past.
    assert ask(Actor(deaths=1, slow=True), Actor(failures=1)) == ("answer", 1)
    [config] = config_of(fake("a")).teachers.values()
    actors = [Actor(failures=1), Actor(failures=1, slow=True)]

    async def start_three_times() -> list[Any]:
        pool = Pool(config, actors, "member-0")
        together = await asyncio.gather(pool.start(), pool.start(), return_exceptions=True)
        return [*(str(error) for error in together), await pool.start()]

    assert asyncio.run(start_three_times()) == ["no memory left", "no memory left", None]
    assert [actor.asked for actor in actors] == [["start"] * 2] * 2


def test_a_replica_that_could_not_start_is_tried_again_while_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_ray.pipeline.members.AGAIN_S", 0.0)
    [config] = config_of(fake("a")).teachers.values()
    failing = Actor(failures=1)

    async def start_until_both_are_up() -> None:
        pool = Pool(config, [Actor(), failing], "member-0")
        await pool.start()
        while pool.nearest(1) != 1:
            await pool.start()
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(start_until_both_are_up(), 60))
    assert failing.asked == ["start"] * 2


def test_a_member_in_an_actor_has_the_keys_of_its_engine() -> None:
    config = config_of({"engine": {"type": "hf", "model": "demo"}}, fake("b"))
    local, remote = Teacher(config), Teacher(config, [[Actor()], [Actor()]])
    messages: Any = [{"role": "user", "content": "How are you?"}]
    for here, there in zip(local.engines, remote.engines, strict=True):
        assert isinstance(there, PooledEngine)
        assert (here.identity, here.prompt_key(messages)) == (there.identity, there.prompt_key(messages))


# -- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"members": []}, "teacher.members: List should have at least 1 item"),
        ({"members": [fake("a", 0)]}, r"teacher.members.0.weight: Input should be greater than 0 \(got 0\)"),
        ({"members": [{"engine": {"type": "none"}}]}, "teacher.members.0.engine: type: none answers nothing; name an"),
        (
            {"members": [fake("a"), {"engine": {"type": "mixture", "members": [fake("a")]}}]},
            "teacher.members.1.engine: a mixture is no member of a mixture; write its members here",
        ),
        (
            {"members": [fake("a", sampling={"temperature": 0})]},
            "teacher.members.0.engine: `sampling` stands on the teacher, .*; move it to teacher.sampling",
        ),
        ({"members": [fake("a", latensy_s=1)]}, "teacher.members.0.engine.latensy_s: unknown key .*`latency_s`"),
        ({"members": [{"engine": {"type": "fke"}}]}, "teacher.members.0.engine.type: unknown .*did you mean `fake`"),
        ({"replicas": 2}, "teacher.replicas: unknown key .*known keys here: members, sampling, type"),
        (
            {"sampling": {"top_logprobs": 5}, "members": [{"engine": {"type": "vllm", "model": "demo"}}, fake("a")]},
            r"teacher.sampling.top_logprobs: the `fake` engine \(teacher.members.1.engine\) cannot do this",
        ),
        (
            {"sampling": {"top_logprobs": 50}, "members": [{"engine": {"type": "openai", "model": "m"}}]},
            r"teacher: member 0 \(`openai`\): sampling.top_logprobs is 50, and OpenAI's API gives 20 at most",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else "".join(c for c in value[:44] if c.isalnum() or c in " ."),
)
def test_the_config_refuses(teacher: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(fake("a"), teacher=teacher)


def test_soft_targets_need_the_ids_of_every_server() -> None:
    switches = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    servers = [{"engine": {"type": "openai", "model": "m", "base_url": "http://h/v1", "extra_body": switches}}]
    keys: Any = {"teacher": {"sampling": {"top_logprobs": 5}}, "train": {"loss": {"type": "topk_kl"}}}
    config_of(*servers, {"engine": {"type": "vllm", "model": "demo"}}, **keys)
    with pytest.raises(ConfigError, match=r"in teacher\.members\.1\.engine\.extra_body"):
        config_of(*servers, {"engine": {"type": "openai", "model": "n"}}, **keys)


def test_what_a_run_folder_keeps_of_the_config_is_the_config(tmp_path: Path) -> None:
    config, folder = config_of(fake("a", 3), fake("b"), teacher={"sampling": {"temperature": 0.1}}), RunFolder(tmp_path)
    write_origin(config, folder)
    assert stored_config(folder) == config
    again = stored_config(folder, ["teacher.sampling.temperature=0", "teacher.members.1.weight=4"])
    assert isinstance(again.teacher, MixtureConfig)
    assert (again.teacher.shares, again.teacher.engines[1].sampling.temperature) == ([3 / 7, 4 / 7], 0)
    with pytest.raises(ConfigError, match=r"`2` is the number of no item; they are 0 to 1"):
        stored_config(folder, ["teacher.members.2.weight=4"])


def test_a_members_paths_start_at_the_configs_folder_and_its_type_is_vllm_by_default(tmp_path: Path) -> None:
    config = config_of({"engine": {"model": "./weights", "chat_template": "t.jinja"}}, where=tmp_path)
    [engine] = config.teachers.values()
    assert engine.type == "vllm"
    assert engine.model == str(tmp_path / "weights")
    assert engine.chat_template == str(tmp_path / "t.jinja")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("members", "same"),
    [
        ([fake("b"), fake("a", 3)], True),
        ([fake("a", 6), fake("b", 2)], True),
        ([fake("a", 3, cpus=4, max_retries=1, replicas=3), fake("b", latency_s=1)], True),
        ([fake("a", 2), fake("b")], False),
        ([fake("a", 3), fake("c")], False),
        ([fake("a", 3), fake("b"), fake("b")], False),
    ],
    ids=["order", "unit of weights", "execution", "weights", "another member", "one more"],
)
def test_examples_are_made_anew_where_answers_or_who_gives_them_may_change(
    members: list[dict[str, Any]], same: bool
) -> None:
    first = generation_fingerprint(config_of(fake("a", 3), fake("b")))
    assert (generation_fingerprint(config_of(*members)) == first) is same


# -- what else looks at the teacher ----------------------------------------------------------------------------------


def test_all_members_are_checked_and_all_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONE_KEY", raising=False)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    keys = [{"engine": {"type": "openai", "model": "m", "api_key_env": name}} for name in ("ONE_KEY", "OTHER_KEY")]
    with pytest.raises(
        ConfigError, match=r"(?s)2 things are wrong.*members\.0\.engine\.api_key_env.*ONE_KEY.*OTHER_KEY"
    ):
        list(check_teacher(config_of(*keys)))
    lines = list(check_teacher(config_of(fake("a", 3, model="big"), fake("b", model="small"))))
    assert lines[-1] == "teacher: each row is answered by one member: 75 % big, 25 % small"


def test_a_service_needs_one_teacher_and_a_calibration_one_judge() -> None:
    config = config_of(fake("a"), fake("b"), calibrate={"metric": "judge"})
    with pytest.raises(ConfigError, match=r"^serve\.teacher: missing, and the teacher, a mixture, cannot stand in"):
        list(check_service(config))
    with pytest.raises(ConfigError, match=r"^calibrate\.judge: missing, and the teacher, a mixture, cannot stand in"):
        _ = config.calibration_judge
    named = config_of(fake("a"), fake("b"), serve={"teacher": {"type": "fake"}})
    assert list(check_service(named)) == ["serve.teacher `fake`"]


def test_the_report_names_all_members_with_their_shares(tmp_path: Path) -> None:
    config, folder = config_of(fake("a", 3, model="big"), fake("b", model="small")), RunFolder(tmp_path)
    write_report(folder, config)
    assert "75 % big, 25 % small (mixture)" in folder.read_bytes("report.md").decode()


def test_the_plan_reckons_each_member_with_its_share(rows: Path) -> None:
    price: Any = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 2.0}
    server = {"weight": 3, "engine": {"type": "openai", "model": "m", "base_url": "http://h/v1"}}
    gpu = {"weight": 1, "engine": {"type": "vllm", "model": "demo", "gpus": 1, "replicas": 2}}

    def planned(*members: dict[str, Any]) -> Estimate:
        return estimate(config_of(*members, where=rows, plan={"teacher": price}))

    found = planned(server, gpu)
    api, own, *_ = found.stages
    assert [stage.name for stage in found.stages] == ["generate 0", "generate 1", "train", "evaluate"]
    assert (api.calls, own.calls) == (45.0, 15.0)
    assert (api.at_min.gpu_hours, own.at_min.replicas, own.at_min.wall_s) == (0.0, 2, 0.0)
    assert own.at_min.gpu_hours == pytest.approx(2 * (api.at_min.wall_s or 0) / 3600)  # as long as all of it takes
    [alone, *_] = planned(server).stages
    assert api.at_min.money == pytest.approx(0.75 * (alone.at_min.money or 0), rel=0.2)  # another tokenizer
    assert any("each member has its share of the calls" in note for note in found.notes)
