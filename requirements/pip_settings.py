"""Print `export UV_...=...` lines that make uv look where this machine's pip looks.

uv reads none of pip's configuration. A machine with a mirror or a folder of wheels of its own says so to pip only, so
the Makefile passes it on. Where pip's settings offer no CPU build of torch (an ordinary laptop), PyTorch's own index of
CPU wheels is added, and only then: an index that cannot be reached stops uv.

    python requirements/pip_settings.py requirements/cpu.txt
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip_settings() -> dict[str, str]:
    """pip's settings by option name; environment over command sections over files, as pip has it."""
    output = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for scope in ("global.", "install.", ":env:."):
        for line in output.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(scope):
                found[key.removeprefix(scope)] = value.strip().strip("'\"").replace("\\n", " ")
    return found


def torch_pin(lock: Path) -> str | None:
    """The lock's torch, if it is a CPU build."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        name = line.split(" ")[0]
        if name.startswith("torch==") and name.endswith("+cpu"):
            return name
    return None


def pip_offers(requirement: str) -> bool:
    """Whether pip, as it is set up here, finds this build."""
    command = [*PIP, "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", requirement]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def uv_environment(lock: Path) -> dict[str, str]:
    """Environment variables for uv."""
    pip = pip_settings()
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # pip's own rule: the best version of all indexes
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
             "cert": "SSL_CERT_FILE"}  # fmt: skip
    for option, variable in names.items():
        if option in pip and variable not in os.environ:
            environment[variable] = pip[option]
    if "trusted-host" in pip:
        environment["UV_INSECURE_HOST"] = pip["trusted-host"]
    if pip.get("no-index", "").lower() in ("1", "true", "yes"):
        environment["UV_NO_INDEX"] = "1"
    torch = torch_pin(lock)
    if torch is not None and not pip_offers(torch):
        environment["UV_INDEX"] = f"{environment.get('UV_INDEX', '')} {TORCH_CPU_INDEX}".strip()
    return environment


if __name__ == "__main__":
    for name, value in uv_environment(Path(sys.argv[1])).items():
        print(f"export {name}={shlex.quote(value)}")
