"""Generate: planned rows -> teacher -> examples and rejects, partition by partition, on Ray Data.

The driver plans (`plan.py`), drops the partitions whose `done/` marker is still true, and hands the rest to a Ray Data
stage over an actor pool (`worker.py`): each actor holds one engine and runs the recipe of many rows of several
partitions at once. A `Tally` actor counts, decides when to stop, and feeds the progress display.

    rows/p -> [recipe x engine, through the ledger calls/p] -> examples/p, rejects/p, done/p
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions

from distill_ray.config import EngineConfig, MixtureConfig, RunConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ConfigError, DistillError, TooManyRejects
from distill_ray.pipeline.capacity import beside_the_driver
from distill_ray.pipeline.cluster import connected, keep_traceback, own_error, raised_by
from distill_ray.pipeline.folder import RunFolder, partition_name
from distill_ray.pipeline.helpers import helper_needs, require_generation, start_helpers
from distill_ray.pipeline.interrupts import insist
from distill_ray.pipeline.planning.plan import Plan, plan_rows
from distill_ray.pipeline.progress import Progress, waiting
from distill_ray.pipeline.recipe_figures import recipe_figures
from distill_ray.pipeline.spending import spending
from distill_ray.pipeline.synthesize import with_queries
from distill_ray.pipeline.tally import Tally
from distill_ray.pipeline.teacher import engine_counts, member_actors, total_retries, worker_resources
from distill_ray.pipeline.worker import Figures, PartitionWorker
from distill_ray.recipes import RECIPES, make_recipe
from distill_ray.records import SCHEMA_VERSION

# Keys that change how fast the teacher answers, not what.
_EXECUTION_KEYS = {"max_concurrency", "max_retries", "timeout_s", "api_key_env", "latency_s"}
_EXECUTION_KEYS |= {"replicas", "cpus", "gpus", "node_labels"}

# Partitions that one engine works on at once: enough that the tail of one is filled by the next.
OPEN_PARTITIONS = 4

# Of a mixture, whose workers only ask: a worker's time for a row is small against an engine's.
ENGINES_PER_WORKER = 4


@dataclass(frozen=True)
class Generation:
    """What one generation came to; the manifest holds the same figures."""

    rows_in: int
    rows_with_examples: int
    rows_rejected: int
    num_examples: int
    rejects: dict[str, int]
    teacher_calls: int
    teacher_calls_replayed: int
    prompt_tokens: int
    completion_tokens: int
    judge_prompt_tokens: int
    judge_completion_tokens: int
    seconds: float


def generate(config: RunConfig, folder: RunFolder, *, limit: int | None = None) -> Generation:
    """Run the stage; safe to repeat.

    Raises:
        InputError: the config or a source is wrong, or a file of them changed meanwhile.
        TooManyRejects: more than `generate.max_reject_frac` of the rows were rejected.
        EngineUnavailable: the teacher cannot be reached at all.
    """
    started = time.monotonic()
    recipe = make_recipe(config.recipe)
    fingerprint = generation_fingerprint(config)
    with_rows = with_queries(config, folder, limit)
    with waiting("reading the rows"):
        plan = plan_rows(with_rows, recipe, folder, limit=limit)
    _clear_emptied(folder, plan)
    planned = [info.index for info in plan.partitions if info.num_rows]
    done = {p: m for p, m in _markers(folder, planned).items() if _still_true(m, plan, p, fingerprint)}
    todo = [p for p in planned if p not in done]
    state: dict[str, Any] = {}
    if todo:
        _forget_figures(folder, generated_with(config))
        with (
            connected(),
            Progress("generate", total=plan.rows_in) as progress,
            spending(folder, "generate", replicas=0) as spent,  # until one is ready
        ):
            state = _run_partitions(config, folder, plan, todo, done, fingerprint, progress, spent)
        if generation_fingerprint(config) != fingerprint:
            raise ConfigError(
                "the context, or a chat template that the config names, changed while the teacher was asked, so nobody "
                "can say what examples/ were made with; run the same command again, with the file as it was (nothing "
                "is paid again) or as it is"
            )
        done |= _markers(folder, todo)
        assert len(done) == len(planned), f"partitions without a marker: {set(planned) - done.keys()}"
    generation = _sum_up(plan, done, set(todo), time.monotonic() - started)
    _write_manifest(config, folder, generation, state)
    _check_rejects(config, generation)
    return generation


def generation_fingerprint(config: RunConfig) -> str:
    """Hash of all that decides what a row's examples are: recipe, context file, teacher, sampling, schema; of other
    packages the version."""
    recipe = make_recipe(config.recipe)
    parts: list[Any] = [SCHEMA_VERSION, recipe.fingerprint, *_answers_of(config)]
    if config.plugins:  # their code may change with their version; a recipe of ours hashes its keys itself
        is_ours = config.recipe.type in RECIPES
        parts += [config.plugins, None if is_ours else config.recipe.model_dump(mode="json")]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _answers_of(config: RunConfig) -> list[Any]:
    """What decides the teacher's answers; of a mixture that of its members and their shares, in any order."""
    if not isinstance(config.teacher, MixtureConfig):
        return _answers_of_engine(config.teacher)
    members = zip(config.teacher.shares, config.teacher.engines, strict=True)
    return ["mixture", *sorted(json.dumps([share, *_answers_of_engine(e)], default=str) for share, e in members)]


def _answers_of_engine(engine: EngineConfig) -> list[Any]:
    template = getattr(engine, "chat_template", None)
    keys = engine.model_dump(exclude=_EXECUTION_KEYS)
    return [make_engine(engine).identity, keys, Path(template).read_text(encoding="utf-8") if template else None]


def generated_with(config: RunConfig) -> str:
    """Hash of what `examples/` are made from, to tell later whether a config still describes them."""
    parts = [generation_fingerprint(config), config.data.model_dump(mode="json")]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def is_generated(config: RunConfig, folder: RunFolder) -> bool:
    """Whether a generation with this config has come to its end here. (New rows, or more of them, may be asked yet.)"""
    manifest = folder.manifest()
    return bool(manifest.get("generation_complete")) and manifest.get("generated_with") == generated_with(config)


def _forget_figures(folder: RunFolder, made_with: str) -> None:
    """The manifest of an earlier generation does not describe one that is under way."""
    names = {field.name for field in dataclasses.fields(Generation)} - {"seconds"} | {"recipe_figures"}
    manifest = {name: value for name, value in folder.manifest().items() if name not in names}
    folder.write_json({**manifest, "generation_complete": False, "generated_with": made_with}, "manifest.json")


def _markers(folder: RunFolder, partitions: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Markers of finished partitions. Where a file or a key is missing there is none: the partition is done again."""
    kinds = [("done", ".json"), ("examples", ".parquet"), ("rejects", ".parquet")]
    there = set[str].intersection(*({n.removesuffix(s) for n in folder.list(kind, suffix=s)} for kind, s in kinds))
    names = {p: partition_name(p) for p in partitions}
    found = folder.read_jsons("done", names=[f"{name}.json" for name in names.values() if name in there])
    markers = {p: found[f"{name}.json"] for p, name in names.items() if name in there}
    return {p: m for p, m in markers.items() if {"rows_sha", "fingerprint", "retry", *vars(Figures())} <= m.keys()}


def _clear_emptied(folder: RunFolder, plan: Plan) -> None:
    """Drop what partitions without rows left behind when they had some."""
    for kind, suffix in (
        ("examples", ".parquet"),
        ("rejects", ".parquet"),
        ("preferences", ".parquet"),
        ("done", ".json"),
    ):
        there = set(folder.list(kind))
        for info in plan.partitions:
            name = partition_name(info.index) + suffix
            if not info.num_rows and name in there:
                folder.remove(kind, name)


def _still_true(marker: dict[str, Any], plan: Plan, partition: int, fingerprint: str) -> bool:
    return (
        marker["rows_sha"] == plan.partitions[partition].sha
        and marker["fingerprint"] == fingerprint
        and not marker["retry"]
    )


# -- the Ray Data stage ----------------------------------------------------------------------------------------------


def _run_partitions(
    config: RunConfig,
    folder: RunFolder,
    plan: Plan,
    todo: list[int],
    done: dict[int, dict[str, Any]],
    fingerprint: str,
    progress: Progress,
    spent: dict[str, float],
) -> dict[str, Any]:
    """Run the stage over the partitions of `todo`; returns the tally's last state."""
    require_generation(config)
    finished_rows = sum(marker["rows"] for marker in done.values())
    finished_rejects = Counter[str]()
    for marker in done.values():
        finished_rejects.update(marker["rejects"])
    tally: Any = (
        ray.remote(Tally)
        .options(**beside_the_driver())
        .remote(
            rows_in=plan.rows_in,
            max_reject_frac=config.generate.max_reject_frac,
            max_tokens=config.generate.max_teacher_tokens,
            rejects=dict(finished_rejects),
            rows_done=finished_rows,
            replayed=sum(marker["calls"] + marker["replayed"] for marker in done.values()),
        )
    )
    resources = worker_resources(config)
    # All engines that there is work and room for are asked for at once, and not one after the other as Ray Data would:
    # it waits for a pool's first results, hours with a real teacher, before it asks a cluster for more nodes. An engine
    # goes as soon as nothing is left for it.
    counts = engine_counts(config, len(todo), helper_needs(config))
    engines_each = ENGINES_PER_WORKER if isinstance(config.teacher, MixtureConfig) else 1
    workers = min(-(-sum(counts) // engines_each), len(todo))
    open_partitions = max(1, min(OPEN_PARTITIONS * engines_each, -(-len(todo) // workers)))
    helpers = start_helpers(config, folder)  # before members that may take all the room beside them
    with member_actors(config, folder, counts, tally) as members:
        helpers = dataclasses.replace(helpers, members=members)
        dataset = ray.data.from_items([{"partition": p} for p in todo], override_num_blocks=len(todo)).map_batches(
            PartitionWorker,
            fn_constructor_args=(
                config,
                folder,
                fingerprint,
                tally,
                [p.sha for p in plan.partitions],
                helpers,
                workers * open_partitions,
            ),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=open_partitions,
                max_concurrent_calls_per_actor=open_partitions,
            ),
            **resources,
        )
        _work_through(dataset, tally, progress, folder, spent)
        retries = total_retries(members)
    state: dict[str, Any] = ray.get(tally.state.remote())
    return {**state, "engine_retries": state["engine_retries"] + retries}


def _work_through(
    dataset: ray.data.Dataset, tally: Any, progress: Progress, folder: RunFolder, spent: dict[str, float]
) -> None:
    """Run the stage to its end. Raises what a worker raised."""
    with _shown(tally, progress, spent):
        try:
            for _ in dataset.iter_rows():
                pass
        except Exception as error:
            # Ray raises one of several wrappers, by where it failed; what we raised in the actor is inside.
            ours = own_error(error)
            if ours is None:
                raise DistillError(
                    f"generation failed inside Ray: {raised_by(error)}; {keep_traceback(error, folder)}. Finished "
                    "calls are kept: run the same command again to go on"
                ) from error
            raise ours from None


@contextmanager
def _shown(tally: Any, progress: Progress, spent: dict[str, float]) -> Iterator[None]:
    """Poll the tally into the progress display, and into what the stage has taken, while the block runs."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.5):
            show()
            insist()

    def show() -> None:
        try:
            state: dict[str, Any] = ray.get(tally.state.remote(), timeout=5)
        except ray.exceptions.RayError:
            return  # the display must never be what ends a run
        spent.update(
            replica_seconds=state["engine_seconds"], working_seconds=state["working_seconds"], calls=state["calls"]
        )
        progress.update(
            state["rows"],
            calls=state["calls"],
            replayed=state["replayed"] or None,
            rejects=" ".join(f"{reason} {count:,}" for reason, count in state["rejects"].items()) or None,
            engines="starting" if not state["engines"] else None,
            **{"tokens/s": f"{state['tokens_per_second']:,.0f}" if state["tokens_per_second"] else None},
        )

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
        show()
    finally:
        stop.set()
        thread.join(timeout=10)


# -- the end ---------------------------------------------------------------------------------------------------------


def _sum_up(plan: Plan, markers: dict[int, dict[str, Any]], ran: set[int], seconds: float) -> Generation:
    rejects = Counter[str]()
    for marker in markers.values():
        rejects.update(marker["rejects"])

    def total(key: str, partitions: Any = markers) -> int:
        return sum(markers[p][key] for p in partitions)

    skipped = markers.keys() - ran
    generation = Generation(
        rows_in=plan.rows_in,
        rows_with_examples=total("rows_with_examples"),
        rows_rejected=sum(rejects.values()),
        num_examples=total("examples"),
        rejects=dict(rejects.most_common()),
        teacher_calls=total("calls", ran),
        teacher_calls_replayed=total("replayed", ran) + total("calls", skipped) + total("replayed", skipped),
        prompt_tokens=total("prompt_tokens"),
        completion_tokens=total("completion_tokens"),
        judge_prompt_tokens=total("judge_prompt_tokens"),
        judge_completion_tokens=total("judge_completion_tokens"),
        seconds=round(seconds, 2),
    )
    assert generation.rows_in == generation.rows_with_examples + generation.rows_rejected, generation
    return generation


def _write_manifest(config: RunConfig, folder: RunFolder, generation: Generation, state: dict[str, Any]) -> None:
    figures = {name: value for name, value in vars(generation).items() if name != "seconds"}
    manifest = {**folder.manifest(), **figures}  # replaced, not merged: a reason that is gone must not linger
    manifest["seeds"] = {**manifest.get("seeds", {}), "sampling": config.teacher.sampling.seed}
    manifest |= {"generation_complete": True, "generated_with": generated_with(config)}
    manifest["engine_retries"] = state.get("engine_retries", 0)
    manifest["recipe_figures"] = recipe_figures(config, folder)
    if state:  # a rerun that finds everything done keeps the seconds of the run that did the work
        seconds = {"engine_start": state["engine_start_s"], "generate_work": state["work_s"]}
        manifest["engines"] = state["engines"]  # restarts counted in: `plan` reckons with a speed per engine
        manifest["seconds"] = {**manifest.get("seconds", {}), "generate": generation.seconds, **seconds}
    folder.write_json(manifest, "manifest.json")


def _check_rejects(config: RunConfig, generation: Generation) -> None:
    """The criterion of `Tally`, held once more at the end, for runs that found all partitions done."""
    counted = sum(n for reason, n in generation.rejects.items() if reason not in Tally.NOT_COUNTED)
    limit = config.generate.max_reject_frac
    if counted > limit * generation.rows_in:
        raise TooManyRejects(Tally.message(counted, generation.rows_in, limit, generation.rejects, []))
