"""A Ray of a command's own, with an engine and a task at work, can be reached from this machine alone."""

from __future__ import annotations

import ipaddress
import os

import psutil
import pytest
import ray

pytestmark = pytest.mark.usefixtures("local_ray")


def test_nothing_that_a_command_starts_listens_beyond_loopback() -> None:
    @ray.remote
    class Actor:
        def pid(self) -> int:
            return os.getpid()

    actor = Actor.remote()
    worker = ray.get(actor.pid.remote())
    mine = {process.pid: process.name() for process in psutil.Process().children(recursive=True)}
    mine[os.getpid()] = "driver"
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in mine]
    names = {mine[connection.pid] for connection in listening}
    assert {"driver", "gcs_server", "raylet", mine[worker]} <= names
    addresses = {ipaddress.ip_address(connection.laddr.ip) for connection in listening}
    beyond = [a for a in addresses if not (getattr(a, "ipv4_mapped", None) or a).is_loopback]
    assert beyond == []
    ray.kill(actor)
