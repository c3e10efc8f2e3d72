"""All benchmarks in turn, their figures in one JSON file, and the README's table made of it.

    python benchmarks/run_all.py                     # hours; goes on where it was stopped, the same day
    python benchmarks/run_all.py --only rewards head_memory
    python benchmarks/run_all.py --table             # only write the README's table anew

benchmarks/results.json holds of each benchmark its command, the day, and what its `--out` gave. Two cores are enough,
with nothing else on them. A benchmark that fails is named at the end and not skipped the same day; the others go on.
Figures of one whose promise does not hold are kept; one that ended without any keeps its earlier ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results.json", ROOT / "README.md"
BEGIN, END = "<!-- begin: python benchmarks/run_all.py --table -->", "<!-- end -->"
DEMO = "runs/demo/bundle"


class Line(NamedTuple):
    """A line of the README's table."""

    against: str
    measured: str
    aim: str


@dataclass(frozen=True)
class Benchmark:
    """One command, and what the README says of its figures."""

    command: str
    """What follows `python benchmarks/`."""

    lines: Callable[[Any], list[Line]] = lambda _: []
    needs_demo: bool = False


def _generation(f: Any) -> list[Line]:
    peers = {"vllm": "plain `vllm.LLM.chat`", "ray_data_llm": "`ray.data.llm`"}
    how = "answers of 64 tokens" if f["answers"] == "fixed" else "short answers"
    what = f"tokens/s, {f['chats']:,} chats, {how}"
    return [Line(f"{peers[peer]}, {what}", f"{ratio:.2f} of its speed", "0.95") for peer, ratio in f["ratios"].items()]


def _waste(f: Any) -> list[Line]:
    whose = {"driver": "the driver", "engine": "vLLM's own process"}[f["victim"]]
    measured = f"{f['wasted']} calls paid twice, {f['at_risk']} at risk; {f['lost']} rows lost, {f['doubled']} doubled"
    against = f"what was in flight or unflushed at {f['kills']} kills of {whose}"
    return [Line(against, measured, "wasted <= at risk")]


def _critique(f: Any) -> list[Line]:
    against = (
        f"three `ray.data.llm` processors in a row: draft, critique, revise for {f['rows']:,} rows, whole processes"
    )
    return [Line(against, f"{f['ratio']:.2f} of the time", "<= 0.6")]


def _logprobs(f: Any) -> list[Line]:
    return [
        Line("the same generation without top-20 log-probabilities, tokens/s", f"{f['ratio']:.2f} of the speed", "0.8")
    ]


def _training(f: Any) -> list[Line]:
    return [Line("TRL's SFTTrainer, grouped by length, tokens/s", f"{f['ratio']:.2f} times", "1.3")]


def _head_memory(f: Any) -> list[Line]:
    peaks = {side: f["ratios"][f"peak_MiB against {side}"] for side in ("every position", "transformers")}
    return [
        Line(
            "a training step at a vocabulary of 150 k with the head on every position, peak memory",
            f"{peaks['every position']:.2f} of it",
            "< 1",
        ),
        Line("the same with transformers' own loss", f"{peaks['transformers']:.2f} of it", "< 0.5"),
    ]


def _rewards(f: Any) -> list[Line]:
    small, large = (f["models"][name]["ratio"] for name in ("built-in", "6 layers, width 384"))
    against = (
        f"transformers' pipeline at batch size {f['batch_size']}, rows/s: built-in classifier; 6 layers, width 384"
    )
    return [Line(against, f"{small:.1f} and {large:.1f} times", ">= 1")]


def _startup(f: Any) -> list[Line]:
    ours, plain = f["median_s"]["ours"], f["median_s"]["vllm"]
    against = "plain vLLM, from the command to the first answer"
    return [Line(against, f"{f['ratio']:.2f} times as long ({ours:.0f} against {plain:.0f} s)", "")]


def _rows(f: Any) -> list[Line]:
    rows = f["rows"]
    _, middle, last = rows["driver_MiB"]["first"]
    against = f"{rows['rows']:,} rows through the fake engine, the driver killed half-way: "
    against += "its memory at half of that and at the end"
    measured = f"{middle} and {last} MiB; {1000 / rows['rows_per_s']:.2f} ms a row; "
    measured += f"{rows['lost']} lost, {rows['doubled']} doubled"
    return [Line(against, measured, "flat")]


def _serving(f: Any) -> list[Line]:
    [one] = [row for row in f["overhead"] if row["clients"] == 1]
    against = (
        f"the same student behind an ingress that decides nothing, one client, to the first words ({f['precision']})"
    )
    return [Line(against, f"{round(one['added_first_p50']):+d} ms", "<= 12 ms")]


def _kills(f: Any) -> list[Line]:
    plain, official = f["plain"], f["official"]
    counts = []
    for of in (plain, official):
        before, after = (sum(of[when].values()) for when in ("before", "after"))
        counts.append((before, before + of["answered"] + after))
    measured = (
        "failed before their first words: {} of {:,} requests of plain HTTP clients, {} of {:,} of the official one"
    )
    return [
        Line(
            f"{f['kills']} kills in six minutes: student replicas, one of two routers",
            measured.format(*counts[0], *counts[1]),
            "0",
        )
    ]


def _cluster_kills(f: Any) -> list[Line]:
    generation, training = f["generation"], f["training"]
    kills = sum(generation["killed"].values())
    measured = f"{generation['wasted']} calls paid twice, {generation['at_risk']} at risk; "
    measured += f"{generation['lost']} of {generation['rows']:,} rows lost, {generation['doubled']} doubled"
    same = "the same weights and curve, bit for bit" if training["holds"] else "NOT the same"
    return [
        Line(f"what {kills} kills of nodes, engines and drivers put at risk", measured, "wasted <= at risk"),
        Line(f"a training that nobody kills, after {sum(training['killed'].values())} kills", same, "the same"),
    ]


def _decision(f: Any) -> list[Line]:
    of = max(f["indexes"], key=lambda index: index["rows"])
    measured = f"{of['search']['p50_ms']:.2f} ms p50, recall@1 {of['recall_at_1']:.3f}; the whole decision "
    measured += f"{of['decision']['p50_ms']:.2f} ms"
    text = f["embedding"][0]
    return [
        Line(f"exhaustive search, {of['rows']:,} trained requests", measured, "<= 1 ms, >= 0.98"),
        Line("sentence-transformers, one short text, on onnxruntime", f"{text['ratio']:.2f} of the time", "< 1"),
    ]


def _attack(f: Any) -> list[Line]:
    worst = max(of["strict"] for of in f.values())
    without = max(of["off"] for of in f.values())
    against = "the router without its guard: trained requests pasted beside unlike ones that reach the student"
    return [Line(against, f"at most {worst:.0%} (without: {without:.0%})", "")]


def _router_quality(f: Any) -> list[Line]:
    router = f["routers"]["fitted"]
    against = "random routing, area under the performance curve (RouteLLM's APGR), "
    against += f"{f['rows']:,} recorded pairs"
    return [Line(against, f"{router['over_random']:.2f} times", "> 1")]


BENCHMARKS = {
    "startup": Benchmark("startup.py", _startup),
    "generation": Benchmark("generation.py", _generation),
    "generation_natural": Benchmark("generation.py --answers natural --peers vllm", _generation),
    "critique": Benchmark("critique.py", _critique),
    "logprobs": Benchmark("logprobs.py", _logprobs),
    "rewards": Benchmark("rewards.py", _rewards),
    "training": Benchmark("training.py", _training),
    "head_memory": Benchmark("head_memory.py", _head_memory),
    "waste": Benchmark("waste.py", _waste),
    "waste_engine": Benchmark("waste.py --victim engine", _waste),
    "rows_100k": Benchmark("scale.py rows --rows 100000", _rows),
    "rows_1m": Benchmark("scale.py rows", _rows),
    "cluster_kills": Benchmark("cluster_kills.py", _cluster_kills),
    "decision": Benchmark("decision.py", _decision),
    "serving": Benchmark("serving.py", _serving),
    "serving_int8": Benchmark("serving.py --precision int8", _serving),
    "router_quality": Benchmark("router_quality.py", _router_quality),
    "router_quality_demo": Benchmark("router_quality.py --run runs/quality", _router_quality),
    "kills": Benchmark("kills.py", _kills),
    "attack": Benchmark(f"attack.py {DEMO}", _attack, needs_demo=True),
}


def read_results() -> dict[str, Any]:
    """What was measured so far, by benchmark."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(results: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = ["| command | against | measured | aim | day |", "|---|---|---|---|---|"]
    for name, benchmark in BENCHMARKS.items():
        if name not in results:
            continue
        command = f"`python benchmarks/{benchmark.command}`"
        for against, measured, aim in benchmark.lines(results[name]["figures"]):
            lines.append(f"| {command} | {against} | {measured} | {aim} | {results[name]['day']} |")
            command = ""
    return "\n".join(lines)


def renewed(readme: str, results: Mapping[str, Any]) -> str:
    """The README with the table of these results."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the README has no table between {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def measure(name: str) -> bool:
    """Run one; whether it went well. Figures are kept at once, also of one that says that its promise does not hold."""
    benchmark = BENCHMARKS[name]
    print(f"\n== {name}: python benchmarks/{benchmark.command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, f"benchmarks/{benchmark.command.split()[0]}", *shlex.split(benchmark.command)[1:]]
        status = subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=False).returncode
        if out.exists():
            day = datetime.date.today().isoformat()
            found = {
                "command": f"python benchmarks/{benchmark.command}",
                "day": day,
                "figures": json.loads(out.read_text()),
                **({"failed": True} if status else {}),
            }
            RESULTS.write_text(json.dumps({**read_results(), name: found}, indent=1, ensure_ascii=False) + "\n")
    return status == 0


def prepare_demo() -> None:
    """The demo's bundle, where it is not there yet."""
    if not (ROOT / DEMO).exists():
        for arguments in (["demo"], ["calibrate", "runs/demo"]):
            subprocess.run([sys.executable, "-m", "distill_ray", *arguments], cwd=ROOT, check=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="these, measured today or not")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the README's table anew")
    options = parser.parse_args()
    today, failed = datetime.date.today().isoformat(), []
    measured_today = {name for name, of in read_results().items() if of["day"] == today and not of.get("failed")}
    names = options.only or [name for name in BENCHMARKS if name not in measured_today]
    for name in [] if options.table else names:
        if BENCHMARKS[name].needs_demo:
            prepare_demo()
        if not measure(name):
            failed.append(name)
        README.write_text(renewed(README.read_text(), read_results()))
    README.write_text(renewed(README.read_text(), read_results()))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
