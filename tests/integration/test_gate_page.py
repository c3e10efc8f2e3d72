"""The page of a cycle's verdict in a real headless Chromium: nothing sticks out, nothing runs, nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from distill_ray.flywheel.page import gate_page
from tests.integration.test_status_page import MARKUP, chromium  # noqa: F401
from tests.unit.test_gate_page import MANIFEST, hostile, results

TEXTS = {
    "markup": MARKUP,
    "long": "w" * 5_000,
    "lines": "one\n" * 300,
    "right to left": "هناك الكتاب الأحمر \u202e في المطبخ " * 30,
}
STICKS_OUT = """
document.querySelectorAll("details").forEach((e) => (e.open = true));
return [...document.querySelectorAll("main *")]
  .filter((e) => !e.closest("svg, thead, .said div") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + " " + e.textContent.slice(0, 40))"""


@pytest.mark.parametrize("width", [360, 800, 1000, 1280])
@pytest.mark.parametrize("name", ["plain", *TEXTS])
def test_it_is_readable_at_any_width(
    chromium: webdriver.Chrome,  # noqa: F811
    tmp_path: Path,
    name: str,
    width: int,
) -> None:
    found: dict[Any, Any] = hostile(TEXTS[name]) if name in TEXTS else results()
    page = tmp_path / "gate.html"
    page.write_text(gate_page(found, 2, MANIFEST), encoding="utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    for log in ("browser", "performance"):
        chromium.get_log(log)  # another test's
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        chromium.get(page.as_uri())
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        assert chromium.execute_script(STICKS_OUT) == []
        assert chromium.title.endswith("cycle 2 · demo")
        assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
        events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith(("data:", "chrome:"))} == {page.as_uri()}
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.get("about:blank")
