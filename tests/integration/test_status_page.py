"""The status page in a real headless Chromium, on the real HTTP face with scripted models behind it. No Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from distill_ray.serving.front import ingress
from distill_ray.serving.front.keys import Key, Keys, digest_of
from distill_ray.serving.metrics import figures
from distill_ray.serving.request import Live
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.routing.router import Reason
from tests.unit.scripted_backend import DOWN, whole
from tests.unit.small_bundle import REQUESTS
from tests.unit.test_service_http import KEY, TRAINED, UNLIKE, Running, turn

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]
FLAGS += ["--disable-quic", "--no-first-run", "--disable-background-networking"]  # nothing of the browser's own
FLAGS += ["--disable-component-update", "--disable-sync"]
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CURVE = {
    "version": "0123456789ab",
    "points": [
        {
            "threshold": at / 10,
            "share": 1 - at / 10,
            "error": 0.2 * (1 - at / 10) if at < 10 else None,
            "error_low": 0.1 * (1 - at / 10),
            "error_high": 0.35 * (1 - at / 10),
            "cost": at / 10,
            "money": at / 5,
        }
        for at in range(11)
    ],
}

SUMMARY = {
    "error_budget": 0.05,
    "confidence": 0.95,
    "pairs": 400,
    "share": 0.5,
    "error": 0.02,
    "error_low": 0.005,
    "error_high": 0.045,
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "needs Debian's packages chromium and chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


class Page:
    """What a person sees of a service."""

    def __init__(self, driver: webdriver.Chrome, service: Running) -> None:
        self.driver, self.service = driver, service
        self.may_fail = False
        """Whether the browser may report requests that failed."""

    def open(self, *, credentials: str = "") -> None:
        self.driver.get(self.service.url.replace("//", f"//{credentials}") + "/")
        self.until(lambda: "Asking" not in self.text("state"))

    def text(self, part: str) -> str:
        return self.driver.find_element(By.ID, part).text

    def until(self, is_so: Callable[[], bool], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.05)

    def shows(self, part: str, *texts: str) -> None:
        """Waits until a part of the page has all of these texts."""
        self.until(lambda: all(text in self.text(part) for text in texts))

    def write(self, field: str, text: str) -> None:
        element = self.driver.find_element(By.ID, field)
        element.clear()
        element.send_keys(text)

    def press(self, value: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"button[value={value}]").click()

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, show_requests=True, prices={"teacher_prompt": 5.0}) as running:
        stub: Any = running.service
        stub.changes = {}

        async def status() -> dict[str, Any]:  # as `replica.Router.status` with its keeper
            live, rig = running.rig.dispatcher.live, running.rig
            bundle = live.bundle
            return {
                "name": "small",
                "bundle": live.version or None,
                "student_up": live.student is not None,
                "threshold": bundle.manifest.threshold if bundle else None,
                "summary": SUMMARY if bundle else None,
                "made": {"when": bundle.manifest.created, "of": bundle.manifest.name} if bundle else None,
                "teacher": "a large one",
                "keeper": True,
                "looks_again": True,
                "shows_requests": True,
                "figures": figures(rig.metrics.families()),
                "recent": rig.noted,
                "history": [],
                "stored_pairs": len(rig.kept),
                "num_routers": 2,
                **({"curve": CURVE} if bundle else {}),
                **stub.changes,
            }

        stub.status = status
        running.service.metrics.bundle.labels("0123456789ab").set(2)
        yield running


@pytest.fixture
def page(chromium: webdriver.Chrome, service: Running) -> Iterator[Page]:
    for log in ("browser", "performance"):
        chromium.get_log(log)  # another test's
    page = Page(chromium, service)
    yield page
    assert chromium.title != "owned"
    if not page.may_fail:
        assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = ("data:", "chrome:")  # in the page; the browser's first tab
    hosts = {urlsplit(url).netloc.rpartition("@")[2] for url in asked if not url.startswith(own)}
    assert hosts == {urlsplit(service.url).netloc}
    chromium.get("about:blank")


def ask(service: Running, *texts: str, model: str = "auto") -> None:
    for text in texts:
        assert service.post({"messages": turn(text), "model": model}).status_code == 200


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_before_the_first_request_and_without_a_bundle_it_says_so(page: Page, service: Running) -> None:
    service.rig.dispatcher.swap(Live())
    page.open()
    assert "Answering · 2 routers" in page.text("state")
    assert "No requests yet" in page.text("share")
    assert "has not answered" in page.text("saved")
    assert "The teacher (a large one) answers everything" in page.text("bundle")
    for part in ("latency", "reasons", "recent"):
        assert page.text(part) == "No requests yet."
    assert "no student to look at" in page.text("looks")
    assert "Nothing yet" in page.text("events")
    assert "None since the start" in page.text("trouble")
    assert "No answer of the teacher yet" in page.text("pairs")
    assert page.text("notices") == ""


def test_requests_show_up_without_a_reload(page: Page, service: Running) -> None:
    page.open()
    ask(service, *REQUESTS[:3], UNLIKE)
    page.shows("share", "75%", "of 4 requests since the start")
    page.shows("reasons", "like trained requests that the student does well good 3 75%")
    page.shows("saved", "30", "tokens that the teacher was not asked for", "money")
    page.shows("latency", "student teacher", "first words, p50 ≤", "whole, p95 ≤")
    page.shows("pairs", "1\npairs in the store", "Nothing waits on disk")
    page.shows(
        *("bundle", "0123456789ab", "made\n2026-01-01 00:00 UTC, of small", "threshold\n0.500"),
        *("at most 5.0% worse, 95% sure, from 400 pairs", "2 routers"),
    )
    page.shows("recent", TRAINED, UNLIKE, "anybody")
    assert page.driver.title == "75% on the student · small"
    rows = page.driver.find_elements(By.CSS_SELECTOR, "#recent tbody tr")
    assert [row.find_elements(By.CSS_SELECTOR, "td")[0].text for row in rows] == ["teacher", *["student"] * 3]


def test_the_last_hour_counts_what_happened_in_it(page: Page, service: Running) -> None:
    now = time.time()
    service.service.changes = {  # type: ignore[attr-defined]
        "history": [
            {"time": now - 3600, "pairs": None},  # no router had reported
            {"time": now - 3595, "pairs": 900, "teacher": 1000.0},
            {"time": now - 1800, "pairs": 950, "teacher": 1050.0, "student": 50.0},
            {"time": now, "pairs": 970, "teacher": 1070.0, "student": 230.0},
        ],
        "stored_pairs": 970,
    }
    ask(service, TRAINED, UNLIKE)
    page.open()
    page.shows("share", "77%", "of 300 requests in the last hour", "50% of 2 since the start")
    label = page.driver.find_element(By.CSS_SELECTOR, "#share svg").get_attribute("aria-label")
    assert label is not None
    assert "between 50% and 90%, lately 90%" in label
    page.shows("pairs", "970", "+70 in the last hour")


def test_the_curve_says_what_the_threshold_gives(page: Page) -> None:
    page.open()
    page.shows("bundle", "Circle: the chosen threshold. A request costs 50% of what", "of the report part alone")
    assert "10% of its answers" not in page.text("bundle"), "one figure for the error, and it is the measured one"
    page.shows("bundle", "50% to the student, 2.0% of those worse (0.5% to 4.5%)")
    assert page.driver.find_elements(By.CSS_SELECTOR, "#bundle svg circle")
    assert "budget 5.0%" in page.text("bundle")


def test_a_figure_is_rounded_as_the_commands_round_it(page: Page, service: Running) -> None:
    summary = {**SUMMARY, "error": 1 / 80, "error_low": 3 / 800, "error_high": 0.0625}
    service.service.changes = {"summary": summary}  # type: ignore[attr-defined]
    page.open()
    low, error, high = (f"{summary[name]:.1%}" for name in ("error_low", "error", "error_high"))
    page.shows("bundle", f"{error} of those worse ({low} to {high})")


def test_kept_pairs_that_are_not_in_the_store_are_accounted_for(page: Page, service: Running) -> None:
    service.service.metrics.pairs.labels("kept").inc(12)
    service.service.metrics.stored.labels("new").inc(8)
    service.service.metrics.stored.labels("already_there").inc(4)
    service.service.changes = {"stored_pairs": 7, "deleted_pairs": 1}  # type: ignore[attr-defined]
    page.open()
    page.shows("pairs", "7\npairs in the store", "kept, on the way to the store 12", "new in the store 8")
    page.shows("pairs", "already there, or deleted before 4", "1 pair deleted from the store so far")


EVENTS = [
    {
        "time": "2026-11-20T10:05:00+00:00",
        "what": "threshold_raised",
        "version": "0123456789ab",
        "text": "6 of 13 answers looked at again were worse: the threshold rises from 0.500 to 0.934",
    },
    {
        "time": "2026-11-20T09:00:00+00:00",
        "what": "promoted",
        "version": "0123456789ab",
        "text": "0123456789ab is current",
    },
]
DRIFT = {
    **{"looks": 120, "agreement": 0.97, "agreement_bound": 0.993, "budget": 0.05, "confidence": 0.95},
    **{"floor": 0.934, "max_tokens_per_day": 200_000, "tokens_today": 7200},
}


def test_second_looks_and_what_followed_are_shown(page: Page, service: Running) -> None:
    service.service.metrics.second_looks.labels("drift", "good").inc(117)
    service.service.changes = {"events": EVENTS, "drift": DRIFT, "threshold": 0.934}  # type: ignore[attr-defined]
    page.open()
    page.shows("looks", "97%", "of the last 120 answers that the teacher gave too", "5.0% may be worse", "good 117")
    page.shows("looks", "At least 0.7% were for a while, 95% sure", "7,200 of 200,000 tokens")
    page.shows("bundle", "threshold\n0.934, raised since it was measured")
    rows = page.driver.find_elements(By.CSS_SELECTOR, "#events tbody tr")
    assert len(rows) == 2
    assert rows[0].text.endswith("the threshold rises from 0.500 to 0.934 threshold_raised")
    assert "20 Nov 2026" in rows[1].text


def test_who_fails_is_named(page: Page, service: Running) -> None:
    service.rig.student.script = lambda body: [DOWN]
    ask(service, TRAINED)
    service.rig.teacher.script = lambda body: [DOWN]
    assert service.post({"messages": turn(UNLIKE)}).status_code == 503
    page.open()
    page.shows("trouble", "the student is not up 1", "teacher 1", "503 1")


@pytest.mark.parametrize(
    ("changes", "part", "texts"),
    [
        ({"keeper": False, "history": None, "stored_pairs": None}, "notices", ["The keeper is away", "as before"]),
        ({"keeper": False, "history": None, "stored_pairs": None}, "pairs", ["Nobody can count them"]),
        ({"keeper": False}, "looks", ["comes with the keeper"]),
        ({"keeper": False}, "events", ["come with the keeper"]),
        ({"looks_again": False}, "looks", ["serve.drift is off"]),
        ({"drift": None}, "looks", ["never measured"]),
        ({"drift": {**DRIFT, "looks": 0, "agreement": None}}, "looks", ["No answer has been looked at again yet"]),
        ({"events": []}, "events", ["Nothing yet"]),
        ({"student_up": False}, "notices", ["The student is not up", "the teacher answers everything"]),
        ({"figures": {"routers": {"aaa": 1.0, "bbb": 1.0}}}, "notices", ["being swapped", "aaa and bbb"]),
        ({"curve": {}}, "bundle", ["no calibration curve"]),
        ({"curve": None, "summary": None, "figures": {}}, "bundle", ["no calibration curve"]),
        ({"curve": {"points": [{"share": 1.0, "error": None}]}}, "bundle", ["no calibration curve"]),
        ({"curve": {"points": 7}}, "bundle", ["cannot be shown"]),
        ({"threshold": NEVER, "summary": {"why": "800 pairs more"}}, "bundle", ["everything goes", "800 pairs"]),
        ({"shows_requests": False}, "recent", ["serve.show_requests is off"]),
    ],
)  # fmt: skip
def test_a_state_is_said_in_words(
    page: Page, service: Running, changes: dict[str, Any], part: str, texts: list[str]
) -> None:
    page.may_fail = "cannot be shown" in texts  # the console has the error
    service.service.changes = changes  # type: ignore[attr-defined]
    ask(service, TRAINED)
    page.open()
    page.shows(part, *texts)
    assert TRAINED in page.text("recent")  # the other parts are there


def test_a_service_that_is_gone_is_said_to_be_and_what_was_known_stays(page: Page, service: Running) -> None:
    page.may_fail = True  # the browser reports connections that were refused
    ask(service, TRAINED)
    page.open()
    page.shows("share", "100%")
    service.__exit__()
    page.shows("notices", "The service does not answer: no connection", "figures below are from")
    assert "Last answer" in page.text("state")
    assert page.driver.title.startswith("Not answering")
    assert "100%" in page.text("share")  # what was known stays
    page.press("route")
    page.shows("decision", "no connection")


def test_a_service_that_fails_is_no_blank_page_and_comes_back(page: Page, service: Running) -> None:
    page.may_fail = True

    async def broken() -> dict[str, Any]:
        raise RuntimeError("a bug")

    status, service.service.status = service.service.status, broken  # type: ignore[method-assign]
    page.open()
    page.shows("notices", "does not answer", "something is wrong with this service", "(HTTP 500)")
    service.service.status = status  # type: ignore[method-assign]
    page.until(lambda: page.text("notices") == "")
    page.shows("state", "Answering")


# -- trying a prompt ---------------------------------------------------------------------------------------------------


def test_a_prompt_shows_which_way_it_goes_and_why_and_nobody_is_asked(page: Page, service: Running) -> None:
    page.open()
    page.write("prompt", TRAINED)
    page.press("route")
    page.shows(
        "decision", "To the student: like trained requests", "at or above the threshold 0.500", "1.000 to the near"
    )
    nearest = page.driver.find_elements(By.CSS_SELECTOR, "#decision tbody tr")
    assert nearest[0].text == f"{TRAINED} 1.000 90%"
    assert len(nearest) == 3
    page.write("prompt", UNLIKE)
    page.press("route")
    page.shows("decision", "To the teacher:", "under the threshold 0.500")
    assert not service.rig.student.bodies
    assert not service.rig.teacher.bodies
    assert "No requests yet" in page.text("share")


def test_the_system_message_is_part_of_what_is_tried(page: Page) -> None:
    page.open()
    page.write("prompt", TRAINED)
    page.driver.find_element(By.CSS_SELECTOR, "#more summary").click()
    page.write("system", "Answer in rhyme.")
    page.press("route")
    page.shows("decision", "To the teacher: another system prompt, tools or format than trained")
    page.write("system", "")
    page.write("prompt", "")
    page.press("route")
    page.shows("decision", "To the teacher: there is no text in it")


def test_the_second_button_really_asks(page: Page, service: Running) -> None:
    page.open()
    page.write("prompt", TRAINED)
    page.press("ask")
    page.shows("answer", "the student says", "7 + 3 tokens")
    page.write("prompt", UNLIKE)
    page.press("ask")
    page.shows("answer", "the teacher says")
    page.shows("decision", "To the teacher")
    page.shows("share", "50%")
    assert service.rig.kept[-1][0].call.collect_header is None
    page.driver.find_element(By.CSS_SELECTOR, "#more summary").click()
    page.driver.find_element(By.ID, "private").click()
    service.rig.teacher.script = lambda body: [whole("this is private")]
    page.press("ask")
    page.shows("answer", "this is private")
    assert service.rig.kept[-1][0].call.collect_header == "no"


def test_with_keys_the_page_opens_by_name_and_password_and_asking_needs_the_key_in_the_box(
    page: Page, service: Running
) -> None:
    page.may_fail = True  # the browser reports the 401
    service.service.keys = Keys([Key("alice", digest_of(KEY))], required=True)
    page.open(credentials=f"me:{KEY}@")
    assert "Answering" in page.text("state")
    page.write("prompt", TRAINED)
    page.press("ask")
    page.shows("decision", "To the student")
    page.shows("answer", "no API key", "HTTP 401")
    assert page.run("return document.activeElement.id") == "key"
    page.write("key", KEY)
    page.press("ask")
    page.shows("answer", "the student says")
    page.shows("recent", "alice")
    stored = page.run("return [localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]


def test_an_error_of_the_service_is_shown(page: Page, service: Running) -> None:
    page.may_fail = True  # the browser reports the 503
    service.rig.teacher.script = lambda body: [DOWN]
    page.open()
    page.write("prompt", UNLIKE)
    page.press("ask")
    page.shows("answer", "That did not work", "the teacher does not answer now", "HTTP 503")


# -- what is not to happen ---------------------------------------------------------------------------------------------


def test_other_peoples_text_is_text(page: Page, service: Running) -> None:
    service.rig.teacher.script = lambda body: [whole(f"said {MARKUP}")]
    bundle = service.rig.bundle
    table = bundle.entries.set_column(
        bundle.entries.schema.get_field_index("text"), "text", [[MARKUP] * len(bundle.entries)]
    )
    live = service.rig.dispatcher.live
    service.rig.dispatcher.swap(dataclasses.replace(live, bundle=dataclasses.replace(bundle, entries=table)))
    event = {"time": MARKUP, "what": MARKUP, "version": MARKUP, "text": MARKUP}
    found: Any = service.service
    found.changes = {"name": MARKUP, "teacher": MARKUP, "summary": {"why": MARKUP}, "events": [event]}
    page.open()
    page.write("prompt", f"{UNLIKE} {MARKUP}")
    page.press("ask")
    page.shows("answer", f"said {MARKUP}")
    page.shows("decision", MARKUP)
    page.shows("recent", MARKUP)
    page.shows("bundle", MARKUP)
    page.shows("events", "Invalid Date", MARKUP)
    assert page.text("name") == MARKUP
    assert page.run("return document.querySelectorAll('img, body script').length") == 1  # the page's own script


def test_every_reason_has_words() -> None:
    text = ingress._PAGE.read_text(encoding="utf-8")
    reasons = text.partition("const REASONS = {")[2].partition("};")[0]
    assert set(re.findall(r"^  (\w+): \"", reasons, re.MULTILINE)) == {reason.value for reason in Reason}


# -- who can read it ---------------------------------------------------------------------------------------------------

_OUTSIDE = """
const outside = (e) => e.getBoundingClientRect().right > e.closest("section").getBoundingClientRect().right;
return [...document.querySelectorAll("section :not(thead, thead *)")].filter(outside).map((e) => e.outerHTML);
"""
_CONTRAST = """
const style = getComputedStyle(document.documentElement), found = {};
const light = (name) => {
  const hex = style.getPropertyValue(name).trim();
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
for (const front of ["--text", "--muted", "--student", "--teacher"])
  for (const back of ["--page", "--card", "--field"]) {
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    found[front + back] = (high + 0.05) / (low + 0.05);
  }
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_a_desktop_and_has_contrast_in_both_schemes(
    page: Page, service: Running, scheme: str, width: int
) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        ask(service, TRAINED, UNLIKE, "word" * 40)
        page.open()
        page.write("prompt", TRAINED)
        page.press("ask")
        page.shows("answer", "the student says")
        page.shows("recent", "word")
        assert page.run("return document.documentElement.scrollWidth") <= width
        assert page.run(_OUTSIDE) == []
        ratios = page.run(_CONTRAST)
        assert min(ratios.values()) >= 4.5, ratios
        backgrounds = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (backgrounds == "rgb(14, 17, 22)") == (scheme == "dark")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_screen_reader_has_names_for_everything(page: Page, service: Running) -> None:
    ask(service, TRAINED)
    page.open()
    nameless = "return [...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).map(e => e.id)"
    assert page.run(nameless) == []
    assert page.run("return document.documentElement.lang") == "en"
    for table in page.driver.find_elements(By.TAG_NAME, "table"):
        assert table.get_attribute("aria-label")
        assert table.find_elements(By.CSS_SELECTOR, "thead th[scope=col]")
        assert table.find_elements(By.CSS_SELECTOR, "tbody th[scope=row]")
    for picture in page.driver.find_elements(By.CSS_SELECTOR, "svg:not([aria-hidden])"):
        assert picture.accessible_name
    for section in page.driver.find_elements(By.TAG_NAME, "section"):
        assert section.accessible_name
