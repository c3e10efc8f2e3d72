"""What a recipe's answers came to, in figures: revisions accepted, labels right, probability that soft targets keep.

    examples/, rejects/, rows/ -> `recipe_figures` of manifest.json -> the command's lines, report.md

The readers go from file to file and keep numbers only; what is made of them are pure functions.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from distill_ray.config import RunConfig, SelfCritiqueRecipeConfig, StepByStepRecipeConfig
from distill_ray.pipeline.equations import equation_match
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.metrics import exact_match
from distill_ray.recipes.answers import is_blank
from distill_ray.records import RejectReason

ENTROPY_BIN_NATS = 0.05
QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}


class Chain(NamedTuple):
    """One draft and its revision. The rewards are None where the recipe has no reward."""

    accepted: bool
    reward_before: float | None
    reward_after: float | None


def recipe_figures(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """The figures that a finished generation has; {} for recipes and settings without any."""
    figures: dict[str, Any] = {}
    if isinstance(config.recipe, SelfCritiqueRecipeConfig):
        figures["revisions"] = revision_figures(_chains(folder))
    recipe = config.recipe
    if isinstance(recipe, StepByStepRecipeConfig) and recipe.label_column is not None and not recipe.learns_gold_only:
        figures["labels"] = label_figures(_labels(folder, recipe.label_column, recipe.rationale_column))
    if config.teacher.sampling.top_logprobs:
        figures["soft_targets"] = soft_target_figures(_topk_logprobs(folder))
    return figures


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """One sentence for each kind of figures, for the terminal and the report."""
    kinds = {"revisions": _revision_line, "labels": _label_line, "soft_targets": _soft_target_line}
    return [line(figures[kind]) for kind, line in kinds.items() if kind in figures]


# -- revisions (self_critique) ---------------------------------------------------------------------------------------


def revision_figures(chains: Iterable[Chain]) -> dict[str, Any]:
    """How many revisions were accepted, and how their rewards lie before and after; over all chains, kept or not."""
    num_chains = num_accepted = 0
    before, after = array("d"), array("d")
    for chain in chains:
        num_chains += 1
        num_accepted += chain.accepted
        if chain.reward_before is not None and chain.reward_after is not None:
            before.append(chain.reward_before)
            after.append(chain.reward_after)
    return {
        "chains": num_chains,
        "accepted": num_accepted,
        "scored": len(before),
        "reward_before": _distribution(before),
        "reward_after": _distribution(after),
    }


def _distribution(values: array[float]) -> dict[str, float] | None:
    if not values:
        return None
    numbers = np.frombuffer(values)
    quantiles = np.quantile(numbers, list(QUANTILES.values()))
    return {"mean": float(numbers.mean()), **dict(zip(QUANTILES, map(float, quantiles), strict=True))}


def _chains(folder: RunFolder) -> Iterator[Chain]:
    """Accepted ones are examples (of the test split the others too), those that were not are rejects, or beside one."""
    columns = ["accepted", "reward_before", "reward_after", "rejected_chains"]
    for table in folder.read_tables("examples", columns=columns):
        for record in table.to_pylist():
            others = record.pop("rejected_chains") or []
            yield Chain(*record.values())
            yield from (Chain(False, other["reward_before"], other["reward_after"]) for other in others)
    for table in folder.read_tables("rejects", columns=["reason", "row"]):
        for record in table.filter(pc.field("reason") == RejectReason.NOT_ACCEPTED.value).to_pylist():
            row = json.loads(record["row"])
            for chain in [row, *row.get("rejected_chains", [])]:
                yield Chain(False, chain["reward_before"], chain["reward_after"])


def _revision_line(figures: Mapping[str, Any]) -> str:
    line = f"revisions: {_share(figures['accepted'], figures['chains'])} accepted"
    before, after = figures["reward_before"], figures["reward_after"]
    if before is None or after is None:
        return line
    return f"{line}; mean reward {before['mean']:.4g} before, {after['mean']:.4g} after"


# -- labels (step_by_step) -------------------------------------------------------------------------------------------


def label_figures(pairs: Iterable[tuple[str | None, str | None]]) -> dict[str, Any]:
    """How often the teacher's label is the data's own, where both are there.

    Args:
        pairs: the teacher's label and the gold one, None where there is none.
    """
    num_compared = num_without = num_same = num_equal = 0
    for label, gold in pairs:
        if gold is None:
            continue
        if label is None:
            num_without += 1
            continue
        num_compared += 1
        num_same += exact_match(label, gold) == 1.0
        num_equal += equation_match(label, gold) == 1.0
    return {
        "compared": num_compared,
        "same": num_same,
        "same_or_equal": num_equal,  # equations that come to the same number count too
        "without_label": num_without,
    }


def _labels(folder: RunFolder, column: str, rationale_column: str | None) -> Iterator[tuple[str | None, str | None]]:
    """What the teacher said and what the row has; a partition's rows have its name.

    Held-out rows without a rationale are left out: where nobody was asked, no label is missing.
    """
    for name in folder.list("examples", suffix=".parquet"):
        examples = folder.read_table("examples", name, columns=["row_id", "task", "teacher_answer"])
        rows = folder.read_table("rows", name, columns=["row_id", "columns"])
        ids, texts = rows["row_id"].to_pylist(), rows["columns"].to_pylist()
        columns = {row_id: json.loads(text) for row_id, text in zip(ids, texts, strict=True)}
        for example in examples.filter(pc.field("task") != "rationale").to_pylist():
            row = columns.get(example["row_id"], {})
            if rationale_column is None or not is_blank(row.get(rationale_column)):
                yield example["teacher_answer"], _gold(row.get(column))


def _gold(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _label_line(figures: Mapping[str, Any]) -> str:
    compared, same, equal = figures["compared"], figures["same"], figures["same_or_equal"]
    line = "labels: none of the teacher's to hold against the data's own"
    if compared:
        line = f"labels: {_share(same, compared)} of the teacher's are the data's own"
        line += f", {_share(equal, compared)} with equations that come to the same" if equal > same else ""
    return line + (f"; answers without a label: {figures['without_label']}" if figures["without_label"] else "")


# -- soft targets ----------------------------------------------------------------------------------------------------


def soft_target_figures(
    targets: Iterable[tuple[int, npt.NDArray[np.float32]]],
) -> dict[str, Any]:
    """How much of the teacher's distribution the top k keep, per token.

    Args:
        targets: number of examples without any, and log-probabilities [T, K] of the others.
    """
    num_tokens = num_without = k = 0
    mass = entropy = 0.0
    counts = np.zeros(0, dtype=np.int64)
    for without, logprobs_TK in targets:
        num_without += without
        if not logprobs_TK.size:
            continue
        num_tokens += len(logprobs_TK)
        k = max(k, logprobs_TK.shape[1])
        p_TK = np.exp(logprobs_TK.astype(np.float64))
        kept_T = p_TK.sum(axis=1).clip(max=1.0)  # rounding can take it above
        outcomes = np.column_stack([p_TK, 1.0 - kept_T])
        mass += float(kept_T.sum())
        entropy_T = -(outcomes * np.log(outcomes, where=outcomes > 0, out=np.zeros_like(outcomes))).sum(axis=1)
        entropy += float(entropy_T.sum())
        more = np.bincount((entropy_T / ENTROPY_BIN_NATS).clip(min=0).astype(np.int64), minlength=len(counts))
        counts = np.pad(counts, (0, len(more) - len(counts))) + more
    return {
        "tokens": num_tokens,
        "k": k,
        "mass": mass / num_tokens if num_tokens else None,
        "entropy_nats": entropy / num_tokens if num_tokens else None,  # of the k and one outcome for all others
        "entropy_counts": counts.tolist(),  # tokens by entropy, in bins of ENTROPY_BIN_NATS from 0
        "examples_without": num_without,
    }


def _topk_logprobs(folder: RunFolder) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    for table in folder.read_tables("examples", columns=["topk_logprobs"]):
        column = table["topk_logprobs"].combine_chunks()
        tokens = column.flatten()
        width = len(tokens.flatten()) // len(tokens) if len(tokens) else 0
        yield column.null_count, tokens.flatten().to_numpy(zero_copy_only=False).reshape(len(tokens), width)


def _soft_target_line(figures: Mapping[str, Any]) -> str:
    line = "soft targets: none"
    if figures["tokens"]:
        line = (
            f"soft targets: {figures['tokens']:,} tokens, k {figures['k']} with {100 * figures['mass']:.2f} % of the "
            f"probability; mean entropy {figures['entropy_nats']:.3f} nats"
        )
    return line + (f"; examples without: {figures['examples_without']}" if figures["examples_without"] else "")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")
