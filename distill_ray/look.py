"""The style sheet that all pages begin with, inlined into each: a page is one file."""

from __future__ import annotations

from pathlib import Path

LOOK = (Path(__file__).parent / "look.css").read_text(encoding="utf-8")
