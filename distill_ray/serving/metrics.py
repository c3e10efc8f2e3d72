"""What the service counts, for Prometheus and for the status page.

Each router counts in a registry of its own and sends its samples along with its reports; the keeper adds them up, so a
scrape sees the whole service, whichever router answers it, and a router that died still counts.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        self.pairs = counter("pairs", "Teacher's answers: kept, or why not.", ["result"])
        self.spool_bytes = Gauge("distill_spool_bytes", "On disk, not yet in the store.", registry=self.registry)
        self.bundle = Gauge(
            "distill_bundle_info", "Routers by the bundle they serve.", ["version"], registry=self.registry
        )

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


def value(families: tuple[Family, ...], name: str, **labels: str) -> float:
    """The sum of a counter's (or gauge's) samples with these labels, for the status page."""
    wanted: Mapping[str, Any] = labels
    return sum(
        sample_value
        for family, _, _, samples in families
        for sample_name, sample_labels, sample_value in samples
        if sample_name == name and wanted.items() <= dict(sample_labels).items() and family
    )
