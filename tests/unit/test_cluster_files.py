"""What describes clusters and jobs: cluster.yaml, jobs/, the image, the manifests. Nothing is started."""

from __future__ import annotations

import copy
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from distill_ray.cli import app

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES = CLUSTER["available_node_types"]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
STAGE = "distill-ray/stage"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "jobs" / "k8s" / f"{name}.yaml").read_text()))


def locked(package: str) -> str:
    [line] = re.findall(rf"^{package}==(\S+)", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)
    return line


def test_rays_own_validation_takes_the_cluster_file_and_refuses_a_broken_one() -> None:
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == TYPES.keys()
    broken = copy.deepcopy(CLUSTER)
    broken["available_node_types"]["teacher"]["gpus"] = 1
    with pytest.raises(ValidationError):
        validate_config(prepare_config(broken))


def test_at_rest_there_is_a_head_without_gpu_or_work_and_nothing_else() -> None:
    assert TYPES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in TYPES.items() if name != CLUSTER["head_node_type"]}
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers.values())
    assert {bool(node["resources"].get("GPU")) for node in workers.values()} == {True, False}
    assert sum(node["max_workers"] for node in workers.values()) <= CLUSTER["max_workers"]
    assert CLUSTER["idle_timeout_minutes"] > 0
    assert all("0.0.0.0" not in command for command in CLUSTER["head_start_ray_commands"])


def test_the_labels_that_stages_ask_for_are_understood_by_the_autoscaler_that_is_started() -> None:
    assert all(node["labels"][STAGE] == name for name, node in TYPES.items() if name != CLUSTER["head_node_type"])
    assert "RAY_enable_autoscaler_v2=1" in CLUSTER["head_start_ray_commands"][-1]
    for name, kind in (("rayjob", "RayJob"), ("rayservice", "RayService")):
        [found] = [m for m in manifests(name) if m["kind"] == kind]
        cluster = found["spec"].get("rayClusterSpec") or found["spec"]["rayClusterConfig"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["enableInTreeAutoscaling"] is True
        labels = {group["groupName"]: group["labels"][STAGE] for group in cluster["workerGroupSpecs"]}
        assert labels == {group: group for group in labels}
        assert labels.keys() <= TYPES.keys()


def test_no_spot_node_trains() -> None:
    spot = {name for name, node in TYPES.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"cpu", "teacher"}


def test_the_image_is_one_and_has_the_versions_that_are_locked() -> None:
    text = (ROOT / "jobs" / "Dockerfile").read_text()
    [base] = re.findall(r"^FROM rayproject/ray:(\S+)$", text, re.MULTILINE)
    assert base == f"{locked('ray')}-py311-cpu"
    [uv] = re.findall(r"uv==(\S+)", text)
    assert f"UV     := uv=={uv}" in (ROOT / "Makefile").read_text()
    for source in re.findall(r"^COPY --chown=ray (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    image = f"REGISTRY/distill-ray:{version[1]}"
    assert CLUSTER["docker"]["image"] == image
    assert image in text
    for path in (ROOT / "jobs" / "k8s").glob("*.yaml"):
        assert set(re.findall(r"image: (\S+)", path.read_text())) == {image}
        assert set(re.findall(r"rayVersion: (\S+)", path.read_text())) <= {locked("ray")}


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_docstring_is_how_it_is_submitted(name: str) -> None:
    source = (ROOT / "jobs" / f"{name}.py").read_text()
    [command] = re.findall(r"^    (ray job submit(?:.*\\\n)*.*)$", source, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[words.index("--runtime-env") + 1] == "jobs/runtime_env.yaml"
    after = words[words.index("--") + 1 :]
    assert after[:3] == ["python", f"jobs/{name}.py", "CONFIG"]
    job = ["flywheel", "run"] if name == "flywheel" else [name]
    require_options(job, [word for word in after[3:] if word.startswith("--")])
    assert len(source.splitlines()) < 25


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_the_command_of_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 0
    command = "flywheel run" if name == "flywheel" else name
    assert f"Usage: {name}.py {command} [OPTIONS]" in capsys.readouterr().out


def test_there_is_a_job_for_each_stage_and_the_service() -> None:
    assert JOBS == ["evaluate", "flywheel", "generate", "run", "serve", "train"]


def test_manifests_call_commands_that_are_there() -> None:
    [job] = manifests("rayjob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["distill-ray", "run"]
    require_options(["run"], [word for word in words if word.startswith("--")])
    [nightly] = manifests("cronjob")
    [container] = nightly["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    words = container["command"]
    words = words[words.index("--") + 1 :]
    assert words[:3] == ["distill-ray", "flywheel", "run"]
    require_options(["flywheel", "run"], [word for word in words if word.startswith("--")])
    assert nightly["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_service_of_the_manifest_is_the_one_that_the_command_writes() -> None:
    from distill_ray.serving import app as service

    [found] = [m for m in manifests("rayservice") if m["kind"] == "RayService"]
    for application in yaml.safe_load(found["spec"]["serveConfigV2"])["applications"]:
        module, _, attribute = application["import_path"].partition(":")
        assert module == service.__name__
        assert callable(getattr(service, attribute))
        assert application["args"].keys() == {"config", "folder", "overrides"}


def test_no_job_takes_data_runs_or_the_environment_along() -> None:
    shipped = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert shipped["working_dir"] == "."
    assert {"/.venv/", "/data/", "/runs/", "/services/"} <= set(shipped["excludes"])


def require_options(path: list[str], options: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(options) <= known
