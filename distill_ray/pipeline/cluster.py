"""Connect to Ray: the cluster in `RAY_ADDRESS` when set, else a local Ray of this command's own.

`address="local"` on purpose: a killed head leaves `ray_current_cluster` behind, and a plain `ray.init()` would join
whatever that file names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import ray


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Be connected to Ray inside the block. Inside an existing connection (tests, jobs) this does nothing."""
    if ray.is_initialized():
        yield
        return
    # Ray 2.60 warns that a future version will stop hiding GPUs from actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Blocks of small tables print a progress bar per operator; ours is the one that people see.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
