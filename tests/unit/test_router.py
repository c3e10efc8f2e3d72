"""The decision: whatever is unclear goes to the teacher, and the reason says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.serving.routing.bundle import Bundle, load_bundle
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.decision import DecisionModel
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.routing.router import Decision, Guard, Reason, decide, screen
from tests.unit.small_bundle import DIM, REQUESTS, WordEmbedder, body, write_small_bundle

EMBEDDER = WordEmbedder()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_small_bundle(tmp_path_factory.mktemp("router") / "bundle"), EMBEDDER.identity)


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    manifest = bundle.manifest.model_copy(update=changes)
    return Bundle(bundle.folder, manifest, bundle.index, bundle.outcomes_N, bundle.entries)


def ask(bundle: Bundle | None, text: str, guard: Guard | None = None, **more: Any) -> Decision:
    key = request_key({**body(text), **more}, [])
    return decide(bundle, key, EMBEDDER.embed([text])[0], guard)


def test_a_trained_request_goes_to_the_student_with_its_neighbours(bundle: Bundle) -> None:
    found = ask(bundle, REQUESTS[4])
    assert (found.route, found.reason) == ("student", Reason.GOOD)
    assert found.similarity == pytest.approx(1.0, abs=1e-5)
    assert found.score == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-4)
    assert [bundle.text(row) for row, _ in found.neighbours][:2] == [REQUESTS[4], REQUESTS[5]]
    assert len(found.neighbours) == 3


@pytest.mark.parametrize(
    ("text", "more", "reason"),
    [
        ("", {}, Reason.EMPTY),
        (REQUESTS[0] + " <|im_end|>", {}, Reason.CONTROL_TOKENS),
        (REQUESTS[0], {"tools": [{"type": "function", "function": {"name": "f"}}]}, Reason.OTHER_FINGERPRINT),
        (REQUESTS[0], {"response_format": {"type": "json_object"}}, Reason.OTHER_FINGERPRINT),
        ("Compose quarterly revenue forecasts", {}, Reason.FAR),
        ("Turn on the light and the oven for me please now", {}, Reason.BELOW_THRESHOLD),
    ],
)
def test_what_the_student_does_not_know_goes_to_the_teacher(
    bundle: Bundle, text: str, more: dict[str, Any], reason: Reason
) -> None:
    found = ask(bundle, text, **more)
    assert (found.route, found.reason) == ("teacher", reason)


def test_a_system_prompt_that_was_not_trained_on_is_another_kind_of_request(bundle: Bundle) -> None:
    messages = [{"role": "system", "content": "Answer in rhymes."}, *body(REQUESTS[0])["messages"]]
    key = request_key({"messages": messages}, [])
    assert decide(bundle, key, EMBEDDER.embed([key.text])[0]).reason is Reason.OTHER_FINGERPRINT


def test_an_image_is_no_text(bundle: Bundle) -> None:
    content = [{"type": "text", "text": REQUESTS[0]}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    key = request_key({"messages": [{"role": "user", "content": content}]}, [])
    assert decide(bundle, key, EMBEDDER.embed([REQUESTS[0]])[0]).reason is Reason.NOT_TEXT


def test_without_a_bundle_the_teacher_answers() -> None:
    assert ask(None, REQUESTS[0]) == Decision("teacher", Reason.NO_BUNDLE)


@pytest.mark.parametrize("broken", [None, np.full(DIM, np.nan, np.float32), np.full(DIM, np.inf, np.float32)])
def test_an_embedder_that_fails_means_the_teacher(bundle: Bundle, broken: np.ndarray | None) -> None:
    found = decide(bundle, request_key(body(REQUESTS[0]), []), broken)
    assert (found.route, found.reason) == ("teacher", Reason.EMBEDDER_FAILED)


def test_far_from_everything_is_the_teachers_whatever_the_score(bundle: Bundle) -> None:
    eager = changed(bundle, model=DecisionModel(kind="similarity", intercept=100.0, weights=[0.0]))
    found = ask(eager, "Compose quarterly revenue forecasts")
    assert found.score == pytest.approx(1.0)
    assert (found.route, found.reason) == ("teacher", Reason.FAR)


def test_the_threshold_of_a_bundle_that_is_not_good_enough_is_never_reached(bundle: Bundle) -> None:
    never = changed(bundle, threshold=NEVER, model=DecisionModel(kind="similarity", intercept=700.0, weights=[0.0]))
    found = ask(never, REQUESTS[0])
    assert (found.route, found.reason, found.score) == ("teacher", Reason.BELOW_THRESHOLD, 1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Wake me at 8 tomorrow", Reason.GUARD_NUMBERS),
        ("Is the shop in Rome open on Monday", Reason.GUARD_NAMES),
        ("Disable the alarm in the garage", Reason.GUARD_NEGATION),
        ("Does the soup not contain milk", Reason.GUARD_NEGATION),
        ("Turn on the light in the kitchen and then write me long essay", Reason.GUARD_ADDS),
    ],
)
def test_the_guard_stops_what_similarity_lets_pass(bundle: Bundle, text: str, reason: Reason) -> None:
    assert ask(bundle, text).route == "student", "without a guard these cross: that is what it is for"
    for found in (ask(bundle, text, "strict"), ask(changed(bundle, guard="strict"), text, "off")):
        assert (found.route, found.reason) == ("teacher", reason)


def test_the_guard_lets_pass_what_only_words_differ_in(bundle: Bundle) -> None:
    assert ask(bundle, "Does the stew contain milk", "strict").route == "student"


@given(st.text(max_size=200), st.sampled_from(["off", "strict"]))
def test_any_text_gets_a_decision_and_only_a_good_one_the_student(bundle: Bundle, text: str, guard: Guard) -> None:
    key = request_key(body(text), [])
    found = screen(bundle, key) or decide(bundle, key, EMBEDDER.embed([key.text])[0], guard)
    if found.route == "student":
        assert found.reason is Reason.GOOD
        assert found.similarity is not None
        assert found.score is not None
        assert found.similarity >= bundle.manifest.far
        assert found.score >= bundle.manifest.threshold
    else:
        assert found.reason is not Reason.GOOD


def test_the_decision_needs_no_ray_and_no_torch() -> None:
    heavy = "{'ray', 'torch', 'vllm', 'sklearn', 'scipy', 'matplotlib'}"
    code = f"import sys, distill_ray.serving.routing.router; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_a_floor_counts_where_it_is_above_the_bundles_threshold(bundle: Bundle) -> None:
    key = request_key(body(REQUESTS[0]), [])
    vector_D = EMBEDDER.embed([key.text])[0]
    found = decide(bundle, key, vector_D)
    assert found.score is not None
    assert decide(bundle, key, vector_D, floor=found.score).route == "student"
    raised = decide(bundle, key, vector_D, floor=found.score + 1e-6)
    assert (raised.route, raised.reason, raised.score) == ("teacher", "below_threshold", found.score)
    assert decide(bundle, key, vector_D, floor=0.0) == found
