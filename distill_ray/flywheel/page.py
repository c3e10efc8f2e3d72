"""The verdict of a cycle as a page that a person can read: `gate.html`, one file, no script, opens offline.

What stands on it is in the JSON files beside it; this brings it in order and in words, and `gate_page.html` draws it.
Requests and answers are other people's text: the template escapes them, and `_printed` is the only way in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distill_ray.flywheel.cycles import STEPS, Cycle, StepName
from distill_ray.look import LOOK
from distill_ray.serving.routing.manifest import NEVER

Results = Mapping[StepName, Mapping[str, Any]]
Row = tuple[Any, ...]

PAGED: tuple[StepName, ...] = ("gate", "bundle", "shadow", "promote")
"""The steps after which there is something new to say."""

MOST_CHARS = 1_000  # of a text; the whole of it is in gate.json
MOST_FAILED = 50  # regression prompts
MOST_REASONS = 5
UNKNOWN = "–"

_TEMPLATE = Path(__file__).parent / "gate_page.html"
_TITLES = {
    "go_on": ("May be promoted", "It passed the gate. A bundle is made of it next, which may still be found wanting."),
    "promoted": ("Promoted", "It was put in service at the end of this cycle."),
    "refused": ("Refused", "What is in service stays. The pairs of this cycle are set aside, and not learnt."),
    "unclear": ("Not shown to be good enough", "What is in service stays. The pairs of this cycle wait for the next."),
    "overtaken": ("Not promoted", "What is in service stays. The pairs of this cycle wait for the next."),
}
_SETS = {"all": "all held-out requests", "new": "of this cycle", "earlier": "of earlier cycles"}
_USES = {
    "train": "learnt",
    "replay": "learnt again, against forgetting",
    "validation": "validation",
    "held_out": "held out",
    "earlier": "held out by earlier cycles",
    "near_evaluation": "not used: near your evaluation sets",
    "near_both": "not used: near both something held out and something learnt",
}
_MINUS = re.compile(r"(?<!\S)-(?=\d)")
# Control characters but tab and line end; orders to write backwards, which outlast the text; half characters.
_STRAYS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_gate_page(cycle: Cycle, step: StepName, result: Mapping[str, Any]) -> None:
    """Write the page of a cycle, with the result of a step that is about to be noted as finished."""
    results: dict[StepName, Mapping[str, Any]] = {**cycle.results(), step: result}
    page = gate_page(results, cycle.number, cycle.run.manifest())
    cycle.files.write_bytes(page.encode(), "gate.html")


def gate_page(results: Results, number: int, manifest: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: what each finished step wrote, up to the gate or further.
        number: of the cycle.
        manifest: of the cycle's run: name and versions.
    """
    gate, verdict = results["gate"], _verdict(results)
    return _template().render(
        {step: results.get(step) for step in STEPS},
        look=Markup(LOOK),
        number=number,
        name=manifest.get("name", "distill-ray"),
        verdict=verdict,
        worst=_worst(gate),
        failed=_failed(gate["regressions"]),
        plot=_plot(gate),
        sets=_sets(gate),
        clusters=_clusters(gate["clusters"]),
        used=[(use, results["split"][name]) for name, use in _USES.items() if results["split"].get(name)],
        steps=[(step, each["made_from"], f"{each['seconds']:,.1f}") for step in STEPS if (each := results.get(step))],
        versions=list(manifest.get("versions", {}).items()),
        actions=_actions(results, verdict["outcome"]),
    )


# -- what it says ------------------------------------------------------------------------------------------------------


def _verdict(results: Results) -> dict[str, Any]:
    """How the cycle ended; where it has not, what the gate says."""
    gate = results["gate"]
    last = next((results[step] for step in PAGED if results.get(step, gate)["outcome"] != "go_on"), gate)
    title, means = _TITLES[last["outcome"]]
    if "promote" in results and last["outcome"] != "promoted":
        title = "Not promoted"
    why = [_MINUS.sub("−", each) for each in last["why"] or gate["why"]]
    if last is gate and (failed := gate["regressions"]["failed"]):
        wrong = f"{len(failed)} of {gate['regressions']['num']} regression prompts are answered wrongly"
        why = [*(each for each in why if not each.startswith("regression: ")), wrong]
    elif last is not gate and last["why"]:
        means = f"The gate let it pass: {'; '.join(gate['why'])}. {means}"
    more = [f"and {len(why) - MOST_REASONS} more reasons"] if len(why) > MOST_REASONS else []
    return {"outcome": last["outcome"], "title": title, "why": [*why[:MOST_REASONS], *more], "means": means}


def _worst(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Where the candidate is not as good as the teacher: first where the student in service is."""
    found, whole = gate["worst"], gate["sets"]["all"]
    num_bad = whole["pairs"] - round((whole["candidate"] or 0.0) * whole["pairs"])
    has_current = gate["current"] is not None
    lost = [each for each in found if each["is_regression"]] if has_current else found
    others = found[len(lost) :]  # regressions come first
    num_lost = whole["lost"] if has_current else num_bad
    names = ["teacher", "current", "candidate"] if has_current else ["teacher", "candidate"]
    headers = {"teacher": "the teacher", "current": "in service", "candidate": "the candidate"}
    shown = f", the first {len(found)} here" if len(found) < num_bad else ""
    shown_lost = f", the first {len(lost)} here" if len(lost) < num_lost else ""
    requests = "request" if num_lost == 1 else "requests"
    if not num_bad:
        note = f"None: all answers to {whole['pairs']:,} held-out requests are as good as the teacher's."
    elif not has_current:
        note = f"No student is in service yet, so there is nothing to fall behind. {_of(num_bad, whole)}{shown}."
    elif not num_lost:
        note = f"None that the student in service answers as well as the teacher. {_of(num_bad, whole)}{shown}."
    else:
        note = (
            f"{num_lost:,} {requests}: the student in service is as good as the teacher there, the candidate not"
            f"{shown_lost}. The other way round: {whole['gained']:,}."
        )
    return {
        "title": "Worse than the student in service" if has_current else "Worse than the teacher",
        "note": note,
        "columns": [("request", "said"), *((headers[name], "said") for name in names), ("held out", "short")],
        "lost": [_answered(each, names) for each in lost],
        "others": [_answered(each, names) for each in others],
        "others_title": f"Where neither is as good as the teacher ({len(others)} shown)",
    }


def _of(num_bad: int, whole: Mapping[str, Any]) -> str:
    return f"Of {whole['pairs']:,} answers {num_bad:,} are not as good as the teacher's"


def _answered(each: Mapping[str, Any], names: Sequence[str]) -> Row:
    return (each["text"], *(each[name] for name in names), _SETS[each["set"]])


def _failed(regressions: Mapping[str, Any]) -> dict[str, Any]:
    failed, num = regressions["failed"], regressions["num"]
    shown = f", the first {MOST_FAILED} here" if len(failed) > MOST_FAILED else ""
    note = f"{len(failed)} of {num} are answered wrongly{shown}." if failed else f"All {num} are answered rightly."
    rows = [(each["text"], each["expected"], each["answer"]) for each in failed[:MOST_FAILED]]
    return {"num": num, "note": note, "rows": rows}


def _sets(gate: Mapping[str, Any]) -> dict[str, Any]:
    has_current = gate["current"] is not None
    current = [("in service", "num")] if has_current else []
    columns = [("", "wide"), ("requests", "num"), ("near-duplicates as one", "num"), ("the candidate", "num"), *current]
    rows = []
    for key, name in _SETS.items():
        each = gate["sets"][key]
        own = [_percent(each["current"])] if has_current else []
        rows.append((name, each["pairs"], each["groups"], _between(each, "candidate"), *own))
    return {"columns": columns, "rows": rows}


def _clusters(clusters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those that stay with the teacher, and those that do not."""
    stay, go = ([each for each in clusters if (each["stays"] is None) is wanted] for wanted in (False, True))

    def row(each: Mapping[str, Any]) -> Row:
        share = f"{each['good']} of {each['held_out']}"
        interval = f" ({_percent(each['low'], 0)} to {_percent(each['high'], 0)})" if each["held_out"] else ""
        return each["name"], each["trained"], share + interval

    return {
        "columns": [("kind, by its middle request", "wide"), ("learnt", "num"), ("as good, of those held out", "num")],
        "note": f"{len(stay)} of {len(clusters)} stay with the teacher, whatever the verdict.",
        "stay": [(*row(each), each["stays"]) for each in stay],
        "rows": [row(each) for each in go],
        "rows_title": f"Kinds in which the candidate is good enough ({len(go)})",
    }


def _actions(results: Results, outcome: str) -> list[Row]:
    """Commands, and what they would do now."""
    num_pairs, has_current = results["snapshot"]["pairs"], results["gate"]["current"] is not None
    again = f"takes these {num_pairs:,} pairs into a new cycle, say after the bad ones are deleted"
    run = {
        "go_on": ("flywheel run config.yaml", "goes on with this cycle, if nobody is at it"),
        "refused": ("flywheel run config.yaml --again", again),
    }.get(outcome, ("flywheel run config.yaml", "begins the next cycle, once there are enough new pairs"))
    delete = "says how many pairs it would delete for good; --owner and --id choose too"
    found = [run, ("pairs delete config.yaml --contains TEXT --dry-run", delete)]
    if outcome == "promoted":
        found.append(("rollback config.yaml", "goes back to the bundle before, at once: student, index and threshold"))
    elif has_current:
        back = "goes back from the bundle in service to the one before; this candidate never was there"
        found.append(("rollback config.yaml", back))
    return found


# -- the picture -------------------------------------------------------------------------------------------------------


def _plot(gate: Mapping[str, Any]) -> dict[str, Any] | None:
    """The differences with their bounds, as words and as places from 0 to 100; no difference is in the middle."""
    found = {name: gate["sets"][key] for key, name in _SETS.items() if gate["sets"][key]["difference"] is not None}
    if not found:
        return None
    reach = 1.1 * max(gate["margin"], *(abs(each[end]) for each in found.values() for end in ("low", "high")))

    def place(difference: float) -> float:
        return round(50.0 + 50.0 * difference / reach, 2)

    strips = [
        {
            "name": name,
            "text": f"{_signed(each['difference'])} ({_signed(each['low'])} to {_signed(each['high'])})",
            **{end: place(each[end]) for end in ("low", "difference", "high")},
        }
        for name, each in found.items()
    ]
    return {"strips": strips, "margin": place(-gate["margin"])}


# -- words and numbers -------------------------------------------------------------------------------------------------


def _percent(value: float | None, digits: int = 1) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def _signed(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def _between(found: Mapping[str, Any], name: str) -> str:
    """A share with its interval."""
    if found[name] is None:
        return UNKNOWN
    return f"{_percent(found[name])} ({_percent(found[f'{name}_low'])} to {_percent(found[f'{name}_high'])})"


def _largest(found: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, number) for name, number in found.items() if number), key=lambda item: -item[1])


def _printed(value: Any) -> Any:
    """What the template prints: text cut and without control characters, before it is escaped."""
    if isinstance(value, int):
        return f"{value:,}"
    if value is None:
        return UNKNOWN
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    left_out = len(value) - MOST_CHARS
    shown = _STRAYS.sub(_picture, value[:MOST_CHARS])
    return f"{shown} … \u2068[{left_out:,} more characters are not shown]\u2069" if left_out > 0 else shown


def _picture(stray: re.Match[str]) -> str:
    """A sign for what has none."""
    code = ord(stray[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printed, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "between": _between, "largest": _largest}
    environment.tests["never"] = lambda threshold: threshold >= NEVER
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
