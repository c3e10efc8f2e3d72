"""A vendor's fine-tuning API on loopback: files, jobs, events, and whatever can go wrong with them. Standard library.

    with ScriptedVendor(statuses=["queued", "running", "succeeded"]) as vendor:
        ...
    vendor.jobs, vendor.files   # what was made there, each once if all is well

`meddle` is called before and after each request is carried out, and may send something else instead: what was made is
made all the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.flywheel.vendor import FineTuned, fine_tune
from distill_ray.pipeline.folder import RunFolder
from tests.unit.scripted_server import Reply

STATUSES = ("validating_files", "queued", "running", "running", "succeeded")
When = Literal["before", "after"]
Meddle = Callable[[str, When], Reply | None]
Talk = list[dict[str, str]]


class ScriptedVendor:
    """See the module docstring.

    Args:
        statuses: of a job, one for each look at it; the last one stays.
        meddle: is told the route ("POST /files") and when, and may answer instead.
        keeps_metadata: False: a vendor that knows none.
        page: entries in a list; None: it knows no pages and ignores `after`.
        error: of a job that fails.
    """

    def __init__(
        self,
        statuses: Sequence[str] = STATUSES,
        *,
        meddle: Meddle = lambda route, when: None,
        keeps_metadata: bool = True,
        page: int | None = 2,
        error: dict[str, Any] | None = None,
    ) -> None:
        self.statuses, self.meddle = list(statuses), meddle
        self.keeps_metadata, self.page, self.error = keeps_metadata, page, error
        self.routes: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.bodies: list[dict[str, Any]] = []
        """Of the jobs."""
        self.event_data: list[Any] = [{"step": 10, "total_steps": 20, "train_loss": 0.5}]
        self._looks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedVendor:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def uploaded(self, part: str) -> list[dict[str, Any]]:
        """Files of "train" or "validation"."""
        return [file for file in self.files.values() if file["filename"].endswith(f"-{part}.jsonl")]

    def serve(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        with self._lock:  # one after the other: a killed process leaves none half done
            path = urlsplit(target).path.removeprefix("/v1")
            route = f"{method} {re.sub(r'ftjob-[0-9]+', 'ID', path)}"
            self.routes.append(route)
            self.headers.append(headers)
            instead = self.meddle(route, "before")
            if instead is not None:
                return instead
            reply = self._carry_out(route, path, dict(parse_qsl(urlsplit(target).query)), headers, body)
            return self.meddle(route, "after") or reply

    def _carry_out(self, route: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        match route:
            case "GET /files":
                return self._page(list(self.files.values())[::-1], query)
            case "POST /files":
                return self._keep(_form(headers["content-type"], body))
            case "GET /fine_tuning/jobs":
                wanted = query.get("metadata[distill_ray]")
                every = list(self.jobs.values())[::-1]
                ours = [job for job in every if (job["metadata"] or {}).get("distill_ray") == wanted]
                return self._page(ours if self.keeps_metadata else every, query)
            case "POST /fine_tuning/jobs":
                return self._begin(json.loads(body))
            case "GET /fine_tuning/jobs/ID/events":
                events = [
                    {
                        "id": f"ev-{n}",
                        "created_at": n,
                        "level": "info",
                        "message": "Step: quotes a secret",
                        "data": data,
                    }
                    for n, data in enumerate(self.event_data)
                ]
                return Reply(body={"object": "list", "data": events, "has_more": False})
            case "GET /fine_tuning/jobs/ID":
                job = self.jobs.get(path.rsplit("/", 1)[1])
                return Reply(404, {"error": {"message": "no such job"}}) if job is None else self._look(job)
        return Reply(404, {"error": {"message": f"Invalid URL ({route})"}})

    def _page(self, entries: list[dict[str, Any]], query: dict[str, str]) -> Reply:
        if self.page is None:
            return Reply(body={"object": "list", "data": entries})
        ids = [entry["id"] for entry in entries]
        rest = entries[ids.index(query["after"]) + 1 :] if "after" in query else entries
        return Reply(body={"object": "list", "data": rest[: self.page], "has_more": len(rest) > self.page})

    def _keep(self, form: dict[str, tuple[str, bytes]]) -> Reply:
        name, content = form["file"]
        file = {
            "id": f"file-{len(self.files)}",
            "object": "file",
            "bytes": len(content),
            "created_at": 1,
            "filename": name,
            "purpose": form["purpose"][1].decode(),
            "status": "processed",
        }
        self.files[file["id"]] = {**file, "content": content.decode()}
        return Reply(body=file)

    def _begin(self, body: dict[str, Any]) -> Reply:
        for part in ("training_file", "validation_file"):
            if part in body and body[part] not in self.files:
                said = {"message": f"invalid {part}: {body[part]}", "param": part, "code": "invalid_file"}
                return Reply(400, {"error": said})
        self.bodies.append(body)
        job = {
            "id": f"ftjob-{len(self.jobs)}",
            "object": "fine_tuning.job",
            "created_at": 1,
            "model": body["model"],
            "status": self.statuses[0],
            "training_file": body["training_file"],
            "validation_file": body.get("validation_file"),
            "fine_tuned_model": None,
            "trained_tokens": None,
            "error": None,
            "metadata": body.get("metadata") if self.keeps_metadata else None,
        }
        self.jobs[job["id"]] = job
        return Reply(body=job)

    def _look(self, job: dict[str, Any]) -> Reply:
        looks = self._looks[job["id"]] = self._looks.get(job["id"], 0) + 1
        job["status"] = self.statuses[min(looks, len(self.statuses)) - 1]
        if job["status"] == "succeeded":
            job |= {"fine_tuned_model": f"ft:{job['model']}:{job['id']}", "trained_tokens": 1234}
        if job["status"] == "failed":
            job["error"] = self.error
        return Reply(body=job)


def _handler_of(vendor: ScriptedVendor) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a reply in one piece: in two, the second waits for an acknowledgement

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = vendor.serve(self.command, self.path, headers, body)
            self.close_connection = reply.close
            if reply.close:
                return
            threading.Event().wait(reply.hang_s)
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            try:
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:  # who asked is gone
                self.close_connection = True

        do_GET = do_POST = _any

        def log_message(self, *_: object) -> None: ...

    return Handler


def _form(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Fields of a multipart form: name -> (file name, content)."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    fields = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        names = dict(re.findall(r'(name|filename)="([^"]*)"', head.decode()))
        fields[names["name"]] = (names.get("filename", ""), content.removesuffix(b"\r\n"))
    return fields


def talks(number: int, say: str = "answer") -> list[Talk]:
    """Conversations to learn from."""
    return [
        [{"role": "user", "content": f"What is question {n}?"}, {"role": "assistant", "content": f"{say} {n}"}]
        for n in range(number)
    ]


def tune(vendor_url: str, root: str, say: Callable[[str], None] = print, **config: Any) -> FineTuned:
    """A whole call, as a test makes it."""
    train, validation = config.pop("train", talks(12)), config.pop("validation", talks(3, "held out"))
    fields = {
        "model": "small",
        "base_url": vendor_url,
        "api_key_env": "TEST_API_KEY",
        "poll_s": 0.01,
        "timeout_s": 30.0,
    }
    settings = OpenAITrainerConfig.model_validate(fields | config)
    return fine_tune(settings, train, validation, RunFolder(root), "vendor", say)


def tune_and_perhaps_die(vendor_url: str, root: str, write: int | None = None, when: When = "before") -> None:
    """In a process of its own: a whole call, killed before or after its n-th file is written, if `write` says so."""
    os.environ["TEST_API_KEY"] = "sk-of-a-child"
    num_written = 0
    write_bytes = RunFolder.write_bytes

    def watched(self: RunFolder, data: bytes | memoryview, *parts: str) -> None:
        nonlocal num_written
        for moment in ("before", "after"):
            if (num_written, moment) == (write, when):
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "before":
                write_bytes(self, data, *parts)
        num_written += 1

    RunFolder.write_bytes = watched  # type: ignore[method-assign]
    tune(vendor_url, root, say=lambda line: None)
