"""Does the bound hold? Simulated streams of requests whose truth is known, decided by the real code.

    python benchmarks/streams.py --out streams.json

A run draws a world (`worlds.py`), trained requests, and held-out ones with an outcome each, and does what a cycle of
the flywheel does: clusters that fall short lose their trained requests (`flywheel.clusters`), the rest gets a score and
a threshold (`study`). The rule that comes of it decides about fresh requests, one by one (`router.weigh`). How often
the student is as good on each is known, so the true error of what goes to it is their mean and no estimate.

Without a shift: the true error is over the budget in 1 - confidence of the runs at most. That is the promise, and each
mix is tested on it (exact, one-sided; the command fails where one is refuted). A bundle that nothing passes keeps every
promise, so the share on the student stands beside it.

With a shift nothing is promised: the threshold stays, the requests change. Then a watch looks at some of the student's
answers (`serve.drift`) and raises the threshold or goes back: after how many requests, and how many worse answers; and
how often it does so without reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.worlds import DIM, KIND, Mix, Topic, World, unit
from distill_ray.config.flywheel import GateConfig
from distill_ray.config.serve import CalibrateConfig, DriftConfig, PricesConfig
from distill_ray.flywheel.clusters import cluster
from distill_ray.serving.calibration.study import Study, Vectors, study
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.routing.router import weigh
from distill_ray.serving.watching.drift import DriftWatch

FRESH = 4000
WATCHED = 50_000  # requests
REFUTED = 0.01  # over all mixes together

EASY, HARD = 0.99, 0.6


def topics(*rates: float, beyond: float | None = None) -> tuple[Topic, ...]:
    """Topics of equal weight."""
    return tuple(Topic(1.0, rate, beyond) for rate in rates)


HALF_HARD = topics(EASY, EASY, EASY, HARD, HARD, HARD)
AT_BUDGET = topics(*[0.9495] * 6)  # a hair's breadth over it: every bundle that lets something pass breaks the promise

MIXES = (
    Mix("easy everywhere", topics(*[EASY] * 6)),
    Mix("half hard", HALF_HARD),
    Mix("easy everywhere, few held out", topics(*[EASY] * 6), held_out=100, budget=0.1, confidence=0.9),
    Mix("half hard, many held out", HALF_HARD, held_out=1000),
    Mix("hard beside easy", (*topics(EASY, EASY, EASY), Topic(1.0, 0.5, beside=0))),
    Mix("a sharp boundary", topics(EASY, beyond=0.5), held_out=1000),
    Mix("unbalanced", tuple(map(Topic, (12, 4, 2, 1, 1), (EASY, HARD, EASY, HARD, EASY)))),
    Mix("at the budget", AT_BUDGET),
    Mix("at the budget, many held out", AT_BUDGET, held_out=1000),
    Mix("at the budget, few held out", topics(*[0.8995] * 6), held_out=100, budget=0.1, confidence=0.8),
    Mix("around the budget", topics(0.92, 0.93, 0.94, 0.95, 0.96, 0.97)),
    Mix("half hard, 30 % of it ten times", HALF_HARD, held_out=1000, repeated=0.3, burst=10),
    Mix("at the budget, 30 % of it twice", AT_BUDGET, repeated=0.3, burst=2),
    Mix("at the budget, 30 % of it ten times", AT_BUDGET, repeated=0.3, burst=10),
    Mix("at the budget, all of it five times", AT_BUDGET, held_out=1000, repeated=1.0, burst=5),
)

BEFORE = MIXES[3]


def easy_topics_at(good: float) -> tuple[Topic, ...]:
    """The topics of BEFORE with another student."""
    return topics(good, good, good, HARD, HARD, HARD)


SHIFTS = {
    "none": HALF_HARD,
    "none, every topic at the budget": topics(*[0.95] * 6),
    "hard topics ten times as frequent": (*topics(EASY, EASY, EASY), *[Topic(10.0, HARD)] * 3),
    "half of the requests: a new hard topic, far": (*HALF_HARD, Topic(6.0, 0.5)),
    "a fifth: a new hard topic beside an easy one": (*HALF_HARD, Topic(1.5, 0.5, beside=0)),
    "the student's quality on easy topics: 93 %": easy_topics_at(0.93),
    "the same: 85 %": easy_topics_at(0.85),
    "the same: 60 %": easy_topics_at(0.60),
}


# -- a bundle ----------------------------------------------------------------------------------------------------------


class AnyEmbedder:
    """For the polarity pairs, which are of no interest here."""

    identity, dim, max_tokens = "any", DIM, 1 << 20

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D]"""
        return unit(np.random.default_rng(0).standard_normal((len(texts), DIM))).astype(np.float32)

    def count_tokens(self, text: str) -> int:
        """Letters."""
        return len(text)


@dataclass(frozen=True)
class Bundle:
    """What a cycle makes."""

    study: Study
    texts: list[str]
    """Of the trained requests."""


def cycle(mix: Mix, world: World, random: np.random.Generator) -> Bundle | None:
    """Clusters, fit, select, report. None: everything stays with the teacher."""
    config = CalibrateConfig(error_budget=mix.budget, confidence=mix.confidence)
    trained, _ = world.draw(mix.trained, random)
    measured, good_P = world.measure(mix, random)
    clusters = cluster(trained, measured, good_P, GateConfig(), confidence=mix.confidence, seed=config.seed)
    rows = np.flatnonzero(clusters.passes_N)
    if not len(rows):
        return None
    kept = Vectors([trained.texts[row] for row in rows], [KIND] * len(rows), trained.vectors_ND[rows])
    made = study(config, "off", PricesConfig(), kept, measured, good_P, AnyEmbedder(), tokens={})
    return None if made.rule.threshold == NEVER else Bundle(made, kept.texts)


def scores(bundle: Bundle, fresh: Vectors) -> np.ndarray:
    """The score of each request that goes to the student; NaN of the others. [N]"""
    made, found = bundle.study, np.full(len(fresh.texts), np.nan)
    for row, (text, vector_D) in enumerate(zip(fresh.texts, fresh.vectors_ND, strict=True)):
        similarities_K, rows_K = made.index.search(vector_D, KIND, CalibrateConfig().neighbours)
        nearest = bundle.texts[int(rows_K[0])]
        decision = weigh(made.rule, text, vector_D, similarities_K, made.outcomes_N[rows_K], nearest)
        if decision.route == "student" and decision.score is not None:
            found[row] = decision.score
    return found


# -- without a shift ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What fresh requests meet."""

    share: float
    """On the student."""

    error: float | None
    """True share of its answers that are worse; None: it gives none."""

    def is_over(self, budget: float) -> bool:
        """Whether the promise is broken. What rounding does is nobody's fault."""
        return self.error is not None and self.error > budget + 1e-9


def served(routed_N: np.ndarray, good_N: np.ndarray) -> Served:
    """Of the requests, and how often the student is good on each."""
    return Served(float(routed_N.mean()), float(1.0 - good_N[routed_N].mean()) if routed_N.any() else None)


def run(mix: Mix, seed: int, num_fresh: int = FRESH) -> Served:
    """One run. The same seed gives the same."""
    random, world = np.random.default_rng([seed, 1]), World(mix.topics, seed)
    bundle = cycle(mix, world, random)
    if bundle is None:
        return Served(0.0, None)
    fresh, good_N = world.draw(num_fresh, random)
    return served(np.isfinite(scores(bundle, fresh)), good_N)


def held(mix: Mix, outcomes: Sequence[Served]) -> dict[str, Any]:
    """How often the promise was broken, against how often it may be."""
    num, over = len(outcomes), sum(each.is_over(mix.budget) for each in outcomes)
    test = binomtest(over, num, 1.0 - mix.confidence, alternative="greater")
    low, high = binomtest(over, num).proportion_ci(0.95, method="exact")
    return {
        "mix": mix.name,
        "held_out": mix.held_out,
        "budget": mix.budget,
        "confidence": mix.confidence,
        "runs": num,
        "over": over,
        "rate": over / num,
        "rate_low": float(low),
        "rate_high": float(high),
        "p_value": float(test.pvalue),
        "nothing_passes": sum(each.error is None for each in outcomes) / num,
        "share": statistics.mean(each.share for each in outcomes),
        "error": mean_or_none([each.error for each in outcomes if each.error is not None]),
    }


def mean_or_none(values: Sequence[float]) -> float | None:
    """None of none."""
    return statistics.mean(values) if values else None


# -- with a shift ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """What a bundle meets after a shift."""

    static: Served
    """With the threshold as it was."""

    actions: list[str]
    requests: int
    """Until the first action; all of them without one."""

    wrong: float
    """Worse answers until then, expected."""

    wrong_in_all: float
    wrong_static: float
    """Had nobody watched."""

    end: Served
    """After all actions."""


def watch(bundle: Bundle, mix: Mix, world: World, random: np.random.Generator) -> Watched:
    """WATCHED requests of a world; looks are at requests drawn from FRESH ones that go to the student."""
    config = DriftConfig()
    fresh, good_N = world.draw(FRESH, random)
    score_N = np.nan_to_num(scores(bundle, fresh), nan=-np.inf)
    static = now = served(score_N > -np.inf, good_N)
    watching = DriftWatch(mix.budget, config.confidence)
    actions: list[str] = []
    rows = np.flatnonzero(score_N > -np.inf)
    requests, wrong, first = 0, 0.0, (WATCHED, 0.0)
    while requests < WATCHED and now.error is not None:
        gap = min(int(random.geometric(config.share * now.share)), WATCHED - requests)
        requests, wrong = requests + gap, wrong + gap * now.share * now.error
        row = int(random.choice(rows))
        watching.add(float(score_N[row]), good=bool(random.random() < good_N[row]))
        action = watching.due()
        if action is None:
            continue
        first = first if actions else (requests, wrong)
        actions.append(action.what)
        floor = np.inf if action.threshold is None else action.threshold
        watching.raised(floor)
        rows, now = np.flatnonzero(score_N >= floor), served(score_N >= floor, good_N)
    wrong_static = WATCHED * static.share * (static.error or 0.0)
    return Watched(static, actions, first[0], first[1] if actions else wrong, wrong, wrong_static, now)


def run_shifts(seed: int) -> dict[str, Watched] | None:
    """One bundle under each shift; None: nothing passes."""
    random = np.random.default_rng([seed, 2])
    bundle = cycle(BEFORE, World(BEFORE.topics, seed), random)
    if bundle is None:
        return None
    return {name: watch(bundle, BEFORE, World(topics, seed), random) for name, topics in SHIFTS.items()}


def shifted(name: str, found: Sequence[Watched]) -> dict[str, Any]:
    """Of all bundles under one shift."""
    budget, num = BEFORE.budget, len(found)
    acted = [each for each in found if each.actions]
    kept = [each for each in found if not each.static.is_over(budget)]
    return {
        "shift": name,
        "bundles": num,
        "share": statistics.mean(each.static.share for each in found),
        "error": mean_or_none([each.static.error for each in found if each.static.error is not None]),
        "over": sum(each.static.is_over(budget) for each in found),
        "acted": len(acted),
        "without_reason": sum(bool(each.actions) for each in kept),
        "within_budget": len(kept),
        "rolled_back": sum("rollback" in each.actions for each in acted),
        "requests": statistics.median(each.requests for each in acted) if acted else None,
        "wrong": statistics.median(each.wrong for each in acted) if acted else None,
        "wrong_in_all": statistics.mean(each.wrong_in_all for each in found),
        "wrong_static": statistics.mean(each.wrong_static for each in found),
        "over_at_end": sum(each.end.is_over(budget) for each in found),
        "share_at_end": statistics.mean(each.end.share for each in found),
    }


# -- all of it ---------------------------------------------------------------------------------------------------------


def mixes_table(found: Sequence[dict[str, Any]]) -> Table:
    """A row per mix."""
    table = Table(
        *("mix", "held out", "promise", "over the budget", "of runs [95 %]", "p", "nothing passes", "share", "error"),
        box=MARKDOWN,
    )
    for of in found:
        table.add_row(
            of["mix"],
            f"{of['held_out']:,}",
            f"{of['budget']:.0%} at {of['confidence']:.0%}",
            f"{of['over']} of {of['runs']}",
            f"{of['rate']:.1%} [{of['rate_low']:.1%}, {of['rate_high']:.1%}]",
            f"{of['p_value']:.3f}",
            f"{of['nothing_passes']:.0%}",
            f"{of['share']:.0%}",
            percent(of["error"]),
        )
    return table


def shifts_table(found: Sequence[dict[str, Any]]) -> Table:
    """A row per shift."""
    table = Table(
        *("shift", "share", "error", "over the budget", "acted", "back", "after", "worse until then"),
        *("worse in all: nobody looks", "watched", "over at the end", "share then"),
        box=MARKDOWN,
    )
    for of in found:
        table.add_row(
            of["shift"],
            f"{of['share']:.0%}",
            percent(of["error"]),
            f"{of['over']} of {of['bundles']}",
            f"{of['acted']} ({of['without_reason']} of {of['within_budget']} without reason)",
            str(of["rolled_back"]),
            "-" if of["requests"] is None else f"{of['requests']:,.0f} requests",
            "-" if of["wrong"] is None else f"{of['wrong']:,.0f}",
            f"{of['wrong_static']:,.0f}",
            f"{of['wrong_in_all']:,.0f}",
            str(of["over_at_end"]),
            f"{of['share_at_end']:.0%}",
        )
    return table


def percent(value: float | None) -> str:
    """A cell."""
    return "-" if value is None else f"{value:.1%}"


def one_thread() -> None:
    """Two processes with two threads each are slower than with one."""
    import faiss
    from threadpoolctl import threadpool_limits

    faiss.omp_set_num_threads(1)
    threadpool_limits(1)


def run_mixes(pool: Executor, mixes: Sequence[Mix], seeds: range) -> list[dict[str, Any]]:
    """All runs of all mixes, a line each as they end."""
    found = []
    for mix in mixes:
        started = time.perf_counter()
        found.append(held(mix, list(pool.map(run, [mix] * len(seeds), seeds))))
        seconds = time.perf_counter() - started
        print(f"{mix.name}: {found[-1]['over']} of {len(seeds)} over the budget, {seconds:.0f} s", flush=True)
    return found


def main() -> None:
    """Parse and run. Exits with 1 where the promise is refuted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="of each mix")
    parser.add_argument("--bundles", type=int, default=40, help="that meet each shift, if something passes")
    parser.add_argument("--mixes", default="", help="only those with this in their name; `none`: only shifts")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    mixes = [mix for mix in MIXES if options.mixes in mix.name]
    started, console = time.perf_counter(), Console(width=250)
    context = multiprocessing.get_context("spawn")  # threads of numpy and faiss do not survive a fork
    with ProcessPoolExecutor(options.processes, context, initializer=one_thread) as pool:
        of_mixes = run_mixes(pool, mixes, range(options.seed, options.seed + options.runs))
        if of_mixes:
            console.print(mixes_table(of_mixes))
        seeds = range(options.seed, options.seed + options.bundles)
        bundles = [each for each in pool.map(run_shifts, seeds) if each is not None]
    of_shifts = [shifted(name, [each[name] for each in bundles]) for name in SHIFTS if bundles]
    if of_shifts:
        console.print(shifts_table(of_shifts))
    seconds = time.perf_counter() - started
    print(f"{len(mixes) * options.runs:,} runs and {len(bundles)} watched bundles in {seconds:.0f} s")
    if options.out:
        options.out.write_text(json.dumps({"mixes": of_mixes, "shifts": of_shifts}, indent=2) + "\n")
    refuted = [of["mix"] for of in of_mixes if of["p_value"] < REFUTED / len(of_mixes)]
    if refuted:
        sys.exit(f"the budget is broken more often than promised: {', '.join(refuted)}")


if __name__ == "__main__":
    main()
