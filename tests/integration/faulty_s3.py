"""A bad day of an object store: a proxy on loopback in front of a good one, which fails some requests by a plan.

error      500, without asking the store
slow_down  503 SlowDown, as S3 says that it is asked too much
stall      no answer for `stall_s`, without asking the store
cut        the connection breaks before the store was asked
lost       the store does what it was asked, and the connection breaks instead of its answer
half       the connection breaks in the middle of the answer's body
denied     403 AccessDenied, without asking the store
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["error", "slow_down", "stall", "cut", "lost", "half", "denied"]
Plan = Callable[[str, str, int], Fault | None]
"""Method, path with query, how often this was asked before -> what goes wrong."""

PASSING: tuple[Fault, ...] = ("error", "slow_down", "stall", "cut", "lost", "half")
_ANSWERS = {"error": (500, "InternalError"), "slow_down": (503, "SlowDown"), "denied": (403, "AccessDenied")}


def seeded(seed: int, share: float, faults: tuple[Fault, ...] = PASSING) -> Plan:
    """Faults for a share of the requests; which ones does not depend on who comes first."""

    def plan(method: str, path: str, turn: int) -> Fault | None:
        digest = hashlib.blake2b(f"{seed} {method} {path} {turn}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        return faults[number % len(faults)] if (number >> 16) % 10_000 < share * 10_000 else None

    return plan


class FaultyS3:
    """The proxy; `plan` may be changed at any time.

    Args:
        upstream: URL of the good store.
        stall_s: longer than its clients wait.
    """

    def __init__(self, upstream: str, stall_s: float = 3.0) -> None:
        self.plan: Plan = lambda method, path, turn: None
        self.asked: list[tuple[str, str, Fault | None]] = []
        self.stall_s = stall_s
        self._upstream = urlsplit(upstream).netloc
        self._turns: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def faults(self) -> Counter[Fault]:
        """How many of each kind there were."""
        return Counter(fault for _, _, fault in self.asked if fault is not None)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What the plan has for a request, which is noted."""
        with self._lock:
            fault = self.plan(method, path, self._turns[method, path])
            self._turns[method, path] += 1
            self.asked.append((method, path, fault))
        return fault

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> http.client.HTTPResponse:
        """The good store's answer, not read yet."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        connection.request(method, path, body, headers)
        return connection.getresponse()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news here."""


def _handler(proxy: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = b"".join(self._body())
            fault = proxy.next_fault(self.command, self.path)
            if fault == "stall":
                time.sleep(proxy.stall_s)
            if fault in ("stall", "cut"):
                return self._break_off()
            if fault in _ANSWERS:
                return self._answer_error(*_ANSWERS[fault])
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            answer = proxy.ask(self.command, self.path, {**headers, "Content-Length": str(len(body))}, body)
            content = answer.read()
            if fault == "lost":
                return self._break_off()
            self._head(answer.status, answer.getheaders(), len(content))
            if self.command == "HEAD":
                return None
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)
            return self._break_off() if fault == "half" else None

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _body(self) -> Iterator[bytes]:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def _answer_error(self, status: int, code: str) -> None:
            xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            self._head(status, [("Content-Type", "application/xml")], len(xml))
            if self.command != "HEAD":
                self.wfile.write(xml)

        def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
            self.send_response_only(status)
            is_head = self.command == "HEAD"
            for name, value in headers:
                if name.lower() not in _HOP or (is_head and name.lower() == "content-length"):
                    self.send_header(name, value)
            if not is_head:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def _break_off(self) -> None:
            """With a reset, as when a machine dies."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def log_message(self, format: str, *arguments: object) -> None:
            """Silent."""

    return Handler


_HOP = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}
