"""Metrics of one answer against another, their mean with an interval, and who is taken for whom.

Pure functions of text and arrays. Scores lie in 0..1, one per row; `interval` bootstraps over rows.

Shape suffix: N rows, B resamples.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distill_ray import plugins
from distill_ray.errors import DistillError
from distill_ray.pipeline.equations import equation_match

MAX_LABELS = 30
MAX_LABEL_CHARS = 60
RESAMPLED_AT_ONCE = 1 << 22  # indexes: bounds memory to some 64 MB

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same text; white space at the ends and runs of it inside do not count, case does."""
    return float(answer.split() == expected.split())


def token_f1(answer: str, expected: str) -> float:
    """Overlap of words, counted with repeats: 2PR / (P + R).

    Words as in SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250, `compute_f1` of its evaluation script): lower
    case, without ASCII punctuation and English articles.
    """
    answer_words, expected_words = _words(answer), _words(expected)
    if not answer_words or not expected_words:
        return float(answer_words == expected_words)
    num_same = sum((Counter(answer_words) & Counter(expected_words)).values())
    return 2 * num_same / (len(answer_words) + len(expected_words))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "equation": equation_match,
}


def metric_of(name: str) -> Callable[[str, str], float]:
    """The metric of an answer against what is expected: ours, or that of another package (`distill_ray.plugins`).

    Raises:
        ConfigError: there is none of this name. The metric itself raises DistillError where a plugin's fails.
    """
    if name in METRICS:
        return METRICS[name]
    function = plugins.load(plugins.Group.METRICS, name)

    def checked(answer: str, expected: str) -> float:
        try:
            value = float(function(answer, expected))
        except Exception as error:
            who = plugins.described(plugins.Group.METRICS, name)
            raise DistillError(f"{who} failed on the answer {answer[:200]!r}: {plugins.why(error)}") from error
        if not math.isfinite(value):
            who = plugins.described(plugins.Group.METRICS, name)
            raise DistillError(f"{who} gave {value} for the answer {answer[:200]!r}; a metric gives a finite number")
        return value

    return checked


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def interval(values: Sequence[float], *, num_resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: one figure per row, at least one.
        num_resamples: B. Equal seeds and lengths draw equal resamples, so metrics of one run share them.
    """
    values_N = np.asarray(values, dtype=np.float64)
    num_rows = len(values_N)
    generator = np.random.default_rng(seed)
    means_B = np.empty(num_resamples)
    step = max(1, RESAMPLED_AT_ONCE // num_rows)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        rows_BN = generator.integers(0, num_rows, size=(size, num_rows))
        means_B[start : start + size] = values_N[rows_BN].mean(axis=1)
    low, high = np.percentile(means_B, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Confusion:
    """counts[i][j]: rows with label i that were answered with label j; other[i]: with none of the labels."""

    labels: list[str]
    counts: list[list[int]]
    other: list[int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def confusion(answers: Sequence[str], expected: Sequence[str]) -> Confusion | None:
    """Who is taken for whom; None unless this is a labelling task: few short labels, some of them twice."""
    rows = [
        (" ".join(answer.split()), " ".join(label.split())) for answer, label in zip(answers, expected, strict=True)
    ]
    labels = sorted({label for _, label in rows})
    if not 2 <= len(labels) <= MAX_LABELS or len(labels) == len(rows) or max(map(len, labels)) > MAX_LABEL_CHARS:
        return None
    times = Counter(rows)
    counts = [[times[answer, label] for answer in labels] for label in labels]
    size = Counter(label for _, label in rows)
    other = [size[label] - sum(row) for label, row in zip(labels, counts, strict=True)]
    return Confusion(labels, counts, other)
