"""What the service counts, for Prometheus and for the status page.

Each router counts in a registry of its own and sends its samples along with its reports; the keeper adds them up, so a
scrape sees the whole service, whichever router answers it, and a router that died still counts.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHARES = tuple(i / 20 for i in range(1, 21))

# name, labels, value: one line of the text format
Sample = tuple[str, tuple[tuple[str, str], ...], float]
# name, help, type, samples
Family = tuple[str, str, str, tuple[Sample, ...]]


class Metrics:
    """One router's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"distill_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(f"distill_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(f"distill_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests by who answered and why.", ["route", "reason"])
        self.responses = counter("responses", "Responses by HTTP status.", ["status"])
        self.errors = counter("errors", "What went wrong, and where.", ["where"])
        self.fallbacks = counter("fallbacks", "Requests that the teacher answered as the student failed.", ["why"])
        self.first = histogram("first_piece_seconds", "Until the first words.", _SECONDS, ["route"])
        self.whole = histogram("seconds", "Until the end of the answer.", _SECONDS, ["route"])
        self.score = histogram("score", "Probability that the student is as good as the teacher.", _SHARES)
        self.tokens = counter("tokens", "Tokens by who answered; kind is prompt or completion.", ["route", "kind"])
        self.saved_tokens = counter("saved_teacher_tokens", "Tokens that the teacher was not asked for (estimate).")
        self.saved_money = counter("saved_money", "Money saved, at the prices of the config (estimate).")
        self.second_looks = counter(
            "second_looks", "Answers looked at again: good, bad, skipped or failed.", ["kind", "result"]
        )
        self.second_look_tokens = counter("second_look_tokens", "Teacher tokens spent on that.", ["kind"])
        self.drift_actions = counter("drift_actions", "What drift led to: raise or rollback.", ["action"])
        self.agreement = gauge("agreement", "Share of second looks that found the student good.", ["version"])
        self.agreement_bound = gauge(
            "agreement_bound", "What that share has been under, with serve.drift.confidence.", ["version"]
        )
        self.pairs = counter("pairs", "Teacher's answers: kept, or why not.", ["result"])
        self.stored = counter(
            "stored_pairs", "Kept pairs that came to the store: new, or already_there (or deleted before).", ["result"]
        )
        self.spool_bytes = gauge("spool_bytes", "On disk, not yet in the store.")
        self.bundle = gauge("bundle_info", "Routers by the bundle they serve.", ["version"])

    def families(self) -> tuple[Family, ...]:
        """All samples, as plain values that cross processes."""
        return tuple(
            (
                family.name,
                family.documentation,
                family.type,
                tuple(
                    (sample.name, tuple(sorted(sample.labels.items())), sample.value)
                    for sample in family.samples
                    if not sample.name.endswith("_created")
                ),
            )
            for family in self.registry.collect()
        )


def add_up(all_families: Iterable[tuple[Family, ...]]) -> tuple[Family, ...]:
    """The sum over routers, sample by sample."""
    head: dict[str, tuple[str, str]] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for families in all_families:
        for name, text, kind, samples in families:
            head.setdefault(name, (text, kind))
            into = values.setdefault(name, {})
            for sample_name, labels, value in samples:
                key = (sample_name, labels)
                into[key] = into.get(key, 0.0) + value
    return tuple(
        (name, *head[name], tuple((key[0], key[1], value) for key, value in into.items()))
        for name, into in values.items()
    )


class _Fixed(Collector):
    def __init__(self, families: tuple[Family, ...]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for name, text, kind, samples in self._families:
            metric = Metric(name, text, kind)
            for sample_name, labels, value in samples:
                metric.add_sample(sample_name, dict(labels), value)
            yield metric


def exposition(families: tuple[Family, ...]) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Fixed(families))
    return generate_latest(registry)


def figures(families: tuple[Family, ...]) -> dict[str, Any]:
    """The figures of the status page."""
    samples = [sample for _, _, _, group in families for sample in group]

    def by(name: str, label: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for sample_name, labels, value in samples:
            if sample_name == name:
                key = dict(labels).get(label, "")
                found[key] = found.get(key, 0.0) + value
        return found

    requests = by("distill_requests_total", "route")
    total = sum(requests.values())
    return {
        "requests": requests,
        "reasons": by("distill_requests_total", "reason"),
        "share_on_student": requests.get("student", 0.0) / total if total else None,
        "first_piece": {route: _quantiles(samples, "distill_first_piece_seconds", route) for route in requests},
        "whole": {route: _quantiles(samples, "distill_seconds", route) for route in requests},
        "saved_teacher_tokens": by("distill_saved_teacher_tokens_total", "").get("", 0.0),
        "saved_money": by("distill_saved_money_total", "").get("", 0.0),
        "second_looks": by("distill_second_looks_total", "result"),
        "pairs": by("distill_pairs_total", "result"),
        "stored": by("distill_stored_pairs_total", "result"),
        "spool_bytes": by("distill_spool_bytes", "").get("", 0.0),
        "routers": by("distill_bundle_info", "version"),
        "fallbacks": by("distill_fallbacks_total", "why"),
        "errors": by("distill_errors_total", "where"),
        "responses": by("distill_responses_total", "status"),
    }


def _quantiles(samples: list[Sample], name: str, route: str) -> dict[str, float | None]:
    """p50 and p95 in seconds, from the buckets of a histogram: the upper edge of the one that holds it."""
    buckets: dict[float, float] = {}
    for sample_name, labels, value in samples:
        found = dict(labels)
        if sample_name == f"{name}_bucket" and found.get("route") == route:
            edge = float(found["le"])
            buckets[edge] = buckets.get(edge, 0.0) + value
    edges = sorted(buckets)
    total = buckets[edges[-1]] if edges else 0.0

    def quantile(share: float) -> float | None:
        edge = next((edge for edge in edges if total and buckets[edge] >= share * total), None)
        return None if edge is None or edge == float("inf") else edge

    return {"p50": quantile(0.5), "p95": quantile(0.95)}
