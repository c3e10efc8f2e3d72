"""A runner of the flywheel as far as its lease goes, in a process of its own: a line in, a line of JSON out.

python -m tests.unit.lease_runner FOLDER [MACHINE BEAT_S TTL_S]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
from typing import Any

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import DistillError
from distill_ray.flywheel import lease
from distill_ray.serving.collecting.store import Lease, PairStore, make_store
from distill_ray.serving.routing.bundles import Bundles


def swap(store: PairStore, times: int) -> list[tuple[int, int]]:
    """Swap what is there so many times, as beats and as takeovers; returns (token, beat) of the swaps that came off."""
    won = []
    for number in range(times):
        before = store.lease()
        if number % 3 == 0:
            after = Lease(before.token + 1, 0, secrets.token_hex(8))
        else:
            after = dataclasses.replace(before, beat=before.beat + 1, holder=secrets.token_hex(8))
        if store.swap_lease(before, after):
            won.append((after.token, after.beat))
    return won


def main(folder: str, machine: str = "", beat_s: str = "10", ttl_s: str = "60") -> None:
    """Do what standard input says until it ends."""
    if machine:
        lease._machine = lambda: machine
    lease.BEAT_S, lease.TTL_S, lease.LOOK_S = float(beat_s), float(ttl_s), 0.02
    store = make_store(StoreConfig(), folder)
    bundles = Bundles(os.path.join(folder, "bundles"))
    held: Any = None
    with contextlib.ExitStack() as stack:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            command, *arguments = line.split()
            try:
                answer: Any = None
                if command == "hold":
                    held = stack.enter_context(lease.hold(store, folder, bundles))
                    answer = held.token
                elif command == "release":
                    stack.close()
                elif command == "require":
                    held.require()
                elif command == "promote":
                    bundles.promote(arguments[0], token=held.token)
                else:
                    answer = swap(store, int(arguments[0]))
            except DistillError as error:
                answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
