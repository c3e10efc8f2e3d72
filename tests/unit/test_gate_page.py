"""The page of a cycle's verdict: what stands on it comes from the JSON, and other people's text stays text."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.config.flywheel import GateConfig
from distill_ray.flywheel.clusters import Cluster
from distill_ray.flywheel.cycles import Cycle
from distill_ray.flywheel.page import MOST_CHARS, MOST_FAILED, gate_page, write_gate_page
from distill_ray.flywheel.verdict import SETS, compare, judge

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;</td></table>"
VOID = {"meta", "link", "br", "img", "input", "hr"}
MANIFEST = {"name": "demo", "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"}}


def results(
    candidate: float = 0.96,
    current: float | None = 0.93,
    *,
    pairs: int = 400,
    earlier: int = 120,
    failed: list[dict[str, str]] | None = None,
    worst: list[dict[str, Any]] | None = None,
    clusters: list[Cluster] | None = None,
) -> dict[Any, dict[str, Any]]:
    """What the steps of a cycle wrote, up to the gate. The shares are those of good answers."""
    config, groups = GateConfig(), np.arange(pairs + earlier)
    draw = np.random.default_rng(7).permutation(len(groups))
    good = draw < candidate * len(groups)
    before = None if current is None else draw[::-1] < current * len(groups)
    masks = {"all": groups >= 0, "new": groups < pairs, "earlier": groups >= pairs}
    sets = {
        name: compare(good[mask], None if before is None else before[mask], groups[mask], config.confidence, 0)
        for name, mask in masks.items()
    }
    failed = failed or []
    verdict = judge(config, sets, [f"{each['text']!r}: {each['expected']}" for each in failed])
    step = {"made_from": "06079910841620e8", "seconds": 1.25, "finished": "2026-11-21T13:55:11+00:00"}
    return {
        "snapshot": {**step, "until": 40, "pairs": 2345, "new_pairs": 1987, "set_aside": 0, "outcome": "go_on"},
        "clean": {
            **step,
            "deleted_since": 3,
            "kept": 2301,
            "dropped": {"too_long": 4, "duplicate": 38},
            "masked": {"email": 17, "phone": 0},
            "owners": {"anna": 1400, "otto": 901},
            "teachers": {"vllm:large": 2301},
            "outcome": "go_on",
        },
        "split": {
            **step,
            "train": 1700,
            "validation": 81,
            "held_out": 400,
            "earlier": 120,
            "near_evaluation": 6,
            "outcome": "go_on",
        },
        "train": {
            **step,
            "current": None if current is None else "0ea87737f0d4",
            "student": {"model": "org/small"},
            "fingerprint": "ed981992e58ae0d7",
            "examples": 1700,
            "validation_examples": 81,
            "rejects": 0,
            "steps": 1093,
            "kept_step": 1000,
            "validation_loss": 0.036390358582139015,
            "outcome": "go_on",
        },
        "gate": {
            **step,
            "outcome": verdict.outcome,
            "why": verdict.why,
            "candidate": "ed981992e58ae0d7",
            "current": None if current is None else "0ea87737f0d4",
            "metric": "exact_match",
            "margin": config.margin,
            "confidence": config.confidence,
            "min_pairs": config.min_pairs,
            "sets": {name: dataclasses.asdict(sets[name]) for name in SETS},
            "regressions": {"num": 12 if failed else 0, "failed": failed},
            "clusters": [dataclasses.asdict(each) for each in CLUSTERS if clusters is None]
            + [dataclasses.asdict(each) for each in clusters or []],
            "worst": WORST if worst is None else worst,
        },
    }


def answered(text: str, *, is_regression: bool, candidate: str = "fr", current: str | None = "de") -> dict[str, Any]:
    return {
        "text": text,
        "set": "new",
        "teacher": "de",
        "candidate": candidate,
        "current": current,
        "is_regression": is_regression,
    }


CLUSTERS = [
    Cluster("Lütfen bu hafta nehrin yanında gel.", 211, 53, 52, 0.899, 0.9995, 23, None),
    Cluster("今天在厨房里的人都觉得很安静。", 94, 40, 21, 0.3613, 0.6848, 17, "53% of 17 are as good, 80% are needed"),
    Cluster("Nobody asked this again.", 7, 0, 0, None, None, 0, "0 held-out requests decide, 5 are needed"),
]
WORST = [answered("lost: where is the red bag?", is_regression=True), answered("neither knew", is_regression=False)]
FAILED = [{"text": "Is soup vegan?", "expected": "contains 'ask the cook'", "answer": "Yes, always."}]
BUNDLE = {
    "outcome": "unclear",
    "why": ["277 held-out pairs cannot show it"],
    "made_from": "be5e9cf981692836",
    "seconds": 14.2,
    "version": "5c1d7be4a001",
    "threshold": 2.0,
    "share": 0.0,
    "error": None,
    "error_low": None,
    "error_high": None,
}


class Seen(HTMLParser):
    """What a browser would make of a page: tags, texts by section. Asserts that every tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = str(dict(attrs)["aria-labelledby"])
            self.sections[self.section] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.section:
            self.sections[self.section] += data + " "

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())

    @property
    def all_text(self) -> str:
        return " ".join(map(self.text, self.sections))


def seen(found: dict[Any, dict[str, Any]]) -> Seen:
    return Seen(gate_page(json.loads(json.dumps(found)), 2, MANIFEST))


# -- what stands on it -------------------------------------------------------------------------------------------------


def test_the_verdict_and_its_reason_come_first_and_the_regressions_next() -> None:
    found = results(0.80, 0.95, failed=FAILED)
    page = seen(found)
    assert list(page.sections)[:3] == ["verdict", "worst", "failed"]
    verdict = page.text("verdict")
    assert verdict.startswith("Refused all: worse than the student in service by ")
    assert "1 of 12 regression prompts are answered wrongly" in verdict
    assert "Is soup vegan?" not in verdict
    worst = page.text("worst")
    num_lost = found["gate"]["sets"]["all"]["lost"]
    assert worst.startswith(f"Worse than the student in service {num_lost} requests:")
    assert worst.index("lost: where is the red bag?") < worst.index("Where neither is as good") < worst.index("neither")
    assert "Is soup vegan? contains 'ask the cook' Yes, always." in page.text("failed")


@pytest.mark.parametrize(
    ("arguments", "title", "reason"),
    [
        ({}, "May be promoted", "the difference to the student in service"),
        ({"current": None}, "May be promoted", "no student is in service yet"),
        ({"candidate": 0.5}, "Refused", "all: worse than the student in service"),
        ({"pairs": 40, "earlier": 20}, "Not shown to be good enough", "60 held-out requests"),
        ({"candidate": 0.91, "pairs": 150, "earlier": 20}, "Not shown to be good enough", "not shown to be at most"),
    ],
)
def test_the_title_says_what_the_gate_found(arguments: dict[str, Any], title: str, reason: str) -> None:
    assert seen(results(**arguments)).text("verdict").startswith(f"{title} {reason}")


@pytest.mark.parametrize(
    ("after", "title", "text"),
    [
        ({"bundle": BUNDLE}, "Not shown to be good enough", "277 held-out pairs cannot show it The gate let it pass: "),
        (
            {
                "bundle": {**BUNDLE, "outcome": "go_on", "why": []},
                "shadow": {
                    "outcome": "refused",
                    "why": ["on real requests at least 9.1% are worse"],
                    "pairs": 1200,
                    "error": 0.11,
                    "error_low": 0.091,
                    "error_high": 0.13,
                    "made_from": "x",
                    "seconds": 2.0,
                },
            },
            "Refused",
            "at least 9.1% are worse",
        ),
        (
            {
                "bundle": {**BUNDLE, "outcome": "go_on", "why": [], "threshold": 0.625, "share": 0.714, "error": 0.021}
                | {"error_low": 0.004, "error_high": 0.048},
                "shadow": {"outcome": "go_on", "skipped": True, "made_from": "x", "seconds": 0.0},
                "promote": {"outcome": "promoted", "marked": 1699, "why": [], "made_from": "x", "seconds": 0.0},
            },
            "Promoted",
            "the difference to the student in service",
        ),
        (
            {
                "bundle": {**BUNDLE, "outcome": "go_on", "why": []},
                "promote": {
                    "outcome": "unclear",
                    "why": ["its student does not start"],
                    "made_from": "x",
                    "seconds": 1,
                },
            },
            "Not promoted",
            "its student does not start",
        ),
    ],
)
def test_what_came_after_the_gate_has_the_last_word(after: dict[str, Any], title: str, text: str) -> None:
    page = seen({**results(), **after})
    assert page.text("verdict").startswith(f"{title} ")
    assert text in page.text("verdict")
    assert "bundle 5c1d7be4a001" in page.text("training")
    if title == "Promoted":
        for figure in ("threshold 0.625", "to the student 71.4%", "2.1% (0.4% to 4.8%)", "marked as learnt 1,699"):
            assert figure in page.text("training")
        assert "goes back to the bundle before" in page.text("act")
    if "shadow" in after and title == "Refused":
        assert "shadow requests 1,200 of those worse 11.0% (9.1% to 13.0%)" in page.text("training")


def test_every_figure_is_that_of_the_json() -> None:
    found = results()
    page = seen(found)
    percent = "{:.1%}".format
    for name, label in (("all", "all held-out requests"), ("new", "of this cycle"), ("earlier", "of earlier cycles")):
        each = found["gate"]["sets"][name]
        low, high = percent(each["candidate_low"]), percent(each["candidate_high"])
        row = f"{label} {each['pairs']} {each['groups']} {percent(each['candidate'])} ({low} to {high}) "
        assert row + percent(each["current"]) in page.text("sets")
        low, middle, high = (f"{each[key]:+.1%}".replace("-", "−") for key in ("low", "difference", "high"))
        assert f"{label} {middle} ({low} to {high})" in page.text("difference")
    assert "at most 5.0% worse" in page.text("difference")
    assert "2 of 3 stay with the teacher" in page.text("clusters")
    assert "94 21 of 40 (36% to 68%) 53% of 17 are as good, 80% are needed" in page.text("clusters")
    assert "7 0 of 0 0 held-out requests decide" in page.text("clusters")
    assert "211 52 of 53 (90% to 100%)" in page.text("clusters")
    pairs = page.text("pairs")
    for figure in ("in this cycle 2,345", "new in the store 1,987", "deleted meanwhile 3", "kept by cleaning 2,301"):
        assert figure in pairs
    assert "duplicate 38 too_long 4" in pairs  # most first
    assert "email 17" in pairs
    assert "phone" not in pairs
    assert "learnt 1,700 validation 81 held out 400 held out by earlier cycles 120 not used: near your" in page.text(
        "from"
    )
    assert "anna 1,400 otto 901 teacher kept pairs vllm:large 2,301" in page.text("from")
    for figure in ("ed981992e58ae0d7", "0ea87737f0d4", "org/small", "steps 1,093 kept step 1,000", "0.03639"):
        assert figure in page.text("training")
    assert "snapshot 06079910841620e8 1.2" in page.text("made")
    assert "torch 2.13.0+cpu" in page.text("made")


def test_no_figure_stands_on_it_that_is_not_in_the_json() -> None:
    figures = re.compile(r"\d[\d,.]*%?")

    def numbers(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set().union(*map(numbers, value.values()), set()) if value else set()
        if isinstance(value, list):
            return set().union(*map(numbers, value)) if value else set()
        if isinstance(value, float):
            return {f"{value:.{n}%}" for n in (0, 1)} | {f"{abs(value):.1%}", f"{value:.4g}", f"{value:,.1f}"}
        return set(figures.findall(f"{value:,}" if isinstance(value, int) else str(value)))

    found = results(0.80, 0.95, failed=FAILED)
    whole = found["gate"]["sets"]["all"]
    known = numbers(found) | numbers(MANIFEST)
    known |= {"1", "2", "3"}  # lost, failed, stay; of 3 clusters
    known |= {str(whole["pairs"] - round(whole["candidate"] * whole["pairs"]))}
    assert {figure.rstrip(".,") for figure in figures.findall(seen(found).all_text)} <= {f.rstrip(".,") for f in known}


def test_the_picture_is_to_scale() -> None:
    found = results()
    page = gate_page(found, 2, MANIFEST)
    each = found["gate"]["sets"]["all"]
    low, high = map(float, re.findall(r'd="M([\d.]+) 15H([\d.]+)M', page)[0])
    (point,) = map(float, re.findall(r'd="M([\d.]+) 15h0"', page)[:1])
    (most,) = map(float, set(re.findall(r'class="most" d="M([\d.]+) ', page)))
    assert 0 < low < point < high < 100
    assert 0 < most < 50
    per_share = (50 - most) / found["gate"]["margin"]
    for place, key in ((low, "low"), (point, "difference"), (high, "high")):
        assert (place - 50) / per_share == pytest.approx(each[key], abs=1e-3)


def test_the_first_cycle_has_no_student_to_be_held_against() -> None:
    page = seen(results(current=None, worst=[answered("not known", is_regression=False, current=None)]))
    assert "difference" not in page.sections
    assert page.text("worst").startswith("Worse than the teacher No student is in service yet")
    assert "not known de fr of this cycle" in page.text("worst")
    assert "in service" not in page.text("sets")
    assert "no student" in page.text("training")


def test_a_cycle_with_nothing_to_complain_of_says_so() -> None:
    page = seen(results(1.0, 0.9, worst=[], clusters=[]))
    assert "None: all answers to 520 held-out requests are as good" in page.text("worst")
    assert "table" not in page.text("worst")
    assert "clusters" not in page.sections
    assert "failed" not in page.sections
    found = results()
    found["gate"]["regressions"] = {"num": 12, "failed": []}
    assert "All 12 are answered rightly." in seen(found).text("failed")


def test_without_earlier_cycles_and_with_what_a_vendor_says() -> None:
    found = results(earlier=0)
    found["split"] = {"train": 9, "held_out": 400, "near_evaluation": 0, "made_from": "x", "seconds": 0.1}
    found["train"] = {
        "current": "0ea87737f0d4",
        "remote": {"base": "ft:small:abc", "base_url": "https://api.vendor.test/v1", "api_key_env": "VENDOR_KEY"},
        "fingerprint": "f",
        "examples": 9,
        "trained_tokens": 48210,
        "made_from": "x",
        "seconds": 0.1,
    }
    page = seen(found)
    assert "of earlier cycles 0 0 –" in page.text("sets")
    assert "of earlier cycles" not in page.text("difference")
    assert "model ft:small:abc at https://api.vendor.test/v1 examples 9 tokens learnt 48,210" in page.text("training")
    assert "validation" not in page.text("training")
    Seen(gate_page(found, 2, {}))


def test_it_counts_what_is_lost_and_gained_and_says_how_much_of_it_is_shown() -> None:
    lost = [answered(f"lost {n}", is_regression=True) for n in range(20)]
    found = results(0.5, 0.9, worst=lost)
    whole = found["gate"]["sets"]["all"]
    assert whole["lost"] - whole["gained"] == round(0.4 * whole["pairs"])
    text = seen(found).text("worst")
    assert f"{whole['lost']} requests: the student in service is as good" in text
    assert f"the first 20 here. The other way round: {whole['gained']}." in text
    found["gate"]["sets"]["all"]["lost"] = 20
    assert "the first 20" not in seen(found).text("worst")


# -- other people's text -----------------------------------------------------------------------------------------------


def hostile(text: str) -> dict[Any, dict[str, Any]]:
    """The same text wherever somebody else's may stand."""
    found = copy.deepcopy(results(0.80, 0.95, failed=[{"text": text, "expected": text, "answer": text}]))
    gate = found["gate"]
    gate["worst"] = [{**answered(text, is_regression=n == 0), "teacher": text, "candidate": text} for n in range(2)]
    gate["why"] = [text, *gate["why"]]
    for cluster in gate["clusters"]:
        cluster |= {"name": text, "stays": cluster["stays"] and text}
    found["clean"] |= {"owners": {text: 3}, "teachers": {text: 3}, "dropped": {text: 3}}
    found["train"]["student"] = {"model": text}
    return found


def page_of(text: str) -> str:
    return gate_page(hostile(text), 2, {"name": text, "versions": {text: text}})


def test_markup_in_requests_answers_and_names_is_shown_as_text() -> None:
    html = page_of(MARKUP)
    page = Seen(html)
    assert not page.tags & {"script", "img"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert MARKUP in page.text("worst")
    assert page.tags == Seen(page_of("plain")).tags
    assert "<script" not in html


def test_templates_in_other_peoples_text_are_not_rendered() -> None:
    assert "{{ 7 * 7 }}{% for %}" in Seen(page_of("{{ 7 * 7 }}{% for %}")).text("worst")


def test_it_needs_nothing_but_itself() -> None:
    html = page_of("https://example.org/x.js")
    page = Seen(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "a"}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action")]
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_a_long_answer_is_cut_and_says_so_and_the_page_stays_small() -> None:
    found = results(0.5, 0.9, failed=[{"text": "t" * 100_000, "expected": "x", "answer": "a" * 100_000}] * 500)
    long = answered("w" * 100_000, is_regression=True, candidate="&" * 100_000, current="&" * 100_000)
    found["gate"]["worst"] = [{**long, "teacher": "&" * 100_000}] * 20
    html = gate_page(found, 2, MANIFEST)
    assert len(html.encode()) < 1_000_000
    page = Seen(html)
    assert f"w … \u2068[{100_000 - MOST_CHARS:,} more characters are not shown]\u2069" in page.text("worst")
    assert "w" * MOST_CHARS in page.text("worst")
    assert "w" * (MOST_CHARS + 1) not in page.text("worst")
    assert f"500 of 12 are answered wrongly, the first {MOST_FAILED} here." in page.text("failed")
    assert len(page.text("verdict")) < 2_000


def test_control_characters_are_made_visible_and_each_text_keeps_its_own_direction() -> None:
    html = page_of("a\x00b\x1b[31mc\x7f\x9b\ud800 \u202eevil")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "a␀b␛[31mc␡\ufffd\ufffd \ufffdevil" in html
    arabic = "هناك الكتاب الأحمر في المطبخ"
    places = re.findall(rf"<(\w+)([^<>]*)>{arabic}", page_of(arabic))
    assert len(places) > 10
    for tag, attributes in places:
        assert 'dir="auto"' in attributes or tag in ("bdi", "title", "dt"), tag


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_no_text_changes_what_the_page_is_made_of(text: str) -> None:
    page = page_of(text)
    page.encode()
    assert Seen(page).tags == Seen(page_of("plain")).tags


# -- the file ----------------------------------------------------------------------------------------------------------


def cycle_in(folder: Path) -> Cycle:
    cycle = Cycle(folder / "0002")
    for name in ("snapshot", "split"):
        cycle.files.write_table(pa.table({"pair_id": ["x"], "split": ["train"]}), f"{name}.parquet")
    return cycle


def test_the_file_follows_the_cycle(tmp_path: Path) -> None:
    cycle = cycle_in(tmp_path)
    found = results()
    gate = found.pop("gate")
    for step, result in found.items():
        cycle.write(step, result)
    write_gate_page(cycle, "gate", gate)
    page = (tmp_path / "0002" / "gate.html").read_text(encoding="utf-8")
    assert "<title>May be promoted · cycle 2 · distill-ray</title>" in page
    assert "begun 2026-11-21 13:55 UTC" in page
    cycle.write("gate", gate)
    write_gate_page(cycle, "bundle", BUNDLE)
    assert "<title>Not shown to be good enough" in (tmp_path / "0002" / "gate.html").read_text(encoding="utf-8")


def test_who_is_killed_before_a_step_is_noted_has_the_page_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill_ray.flywheel import cycle as module

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    cycle = cycle_in(tmp_path)
    for step, result in {**results(), "bundle": {**BUNDLE, "outcome": "go_on", "why": []}}.items():
        cycle.write(step, result)
    monkeypatch.setattr(cycle, "write", killed)
    tried = {"outcome": "refused", "why": ["too many are worse"]}
    monkeypatch.setitem(module._DO, "shadow", lambda work: dict(tried))
    work: Any = SimpleNamespace(cycle=cycle, lease=SimpleNamespace(require=lambda: None), say=print)
    with pytest.raises(KeyboardInterrupt):
        module._done(work, "shadow", "06079910841620e8")
    assert not cycle.files.exists("shadow.json")
    assert "<title>Refused" in (tmp_path / "0002" / "gate.html").read_text(encoding="utf-8")
