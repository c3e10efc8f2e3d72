"""Who may import whom. The tree is the diagram, and this keeps it true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distill_ray"

# A package may import what stands on an earlier line; packages on one line do not know one another.
LAYERS = [
    {"errors", "look", "nearby", "records"},
    {"object_store"},
    {"node_cache", "plugins"},
    {"config", "model_files"},
    {"completion", "models"},
    {"recipes", "engines", "student", "demo", "doctor"},
    {"rewards"},
    {"pipeline"},
    {"serving"},
    {"flywheel"},
    {"cli"},
    {"__main__"},
]
# Beside the obvious: TensorBoard's writer is part of torch, and DeepSpeed gathers the weights that it sharded.
HEAVY = {
    "ray": {
        "pipeline",
        *(f"serving/{name}.py" for name in ("app", "replica", "students")),
        *(f"serving/models/{name}.py" for name in ("applications", "deployed", "vllm")),
    },
    "torch": {
        "student",
        "demo",
        "engines/hf_model.py",
        "rewards/models.py",
        "pipeline/training/train_loop.py",
        "pipeline/training/train_metrics.py",
        "serving/routing/embedder_torch.py",
        "doctor.py",
    },
    "vllm": {"engines/vllm.py", "demo/check_model.py", "serving/models/vllm.py"},
    "deepspeed": {"pipeline/training/train_loop.py", "student/export.py"},
}


# The wall clock is set back and forth. But for the service, which dates what it keeps, it is asked what to tell people,
# and what an HTTP date of a server means; all else goes by time.monotonic.
WALL_CLOCK = {"pipeline/lock.py", "pipeline/folder.py", "engines/openai_errors.py"}
CLOCKS = {"time.time", "time.time_ns", "datetime.datetime.now", "datetime.now", "datetime.date.today"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.iter_child_nodes(tree) if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "errors"


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_layers_below_it(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("distill_ray.") or part_of(module) == own:
            continue
        assert level(part_of(module)) < level(own), f"{path.name} ({own}) may not import {module}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for module in imports(path):
        allowed = HEAVY.get(module.split(".")[0])
        if allowed is not None:
            assert name in allowed or name.split("/")[0] in allowed, f"{name} may not import {module}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_decided_by_the_wall_clock(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    asked = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)} & CLOCKS
    assert not asked or name in WALL_CLOCK or name.startswith("serving/"), f"{name} asks {asked}"


def test_every_module_belongs_to_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()} - {"__init__"}
    assert parts == set().union(*LAYERS)
