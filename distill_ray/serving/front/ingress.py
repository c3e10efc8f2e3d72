"""The HTTP face: routes, keys, sizes, events and errors as the OpenAI API has them. What happens to a request is
`dispatch`; who runs this is `replica`.

A page on another site must not be able to spend the teacher's money through a browser on this machine: only JSON
bodies are taken (which makes a browser ask first, and no CORS here allows it), and a service on loopback answers to
loopback's names only (a site whose own name was turned into 127.0.0.1 sends that name).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from distill_ray.config import ServeConfig
from distill_ray.errors import ApiError
from distill_ray.look import LOOK
from distill_ray.serving.backends import Method
from distill_ray.serving.dispatch import Dispatcher, Routed
from distill_ray.serving.front.keys import LOOPBACK, Keys
from distill_ray.serving.front.limits import Limits
from distill_ray.serving.front.wire import (
    DONE,
    HANDED_ON,
    ChatRequest,
    CompletionRequest,
    event,
    json_bytes,
    parse_request,
)
from distill_ray.serving.metrics import CONTENT_TYPE, Metrics
from distill_ray.serving.request import Call

ROUTES = ("auto", "teacher", "student")
MAX_KEY = 255  # characters of an Idempotency-Key
BUSY_RETRY_S = 1.0
_LOG = logging.getLogger("distill_ray.serving")
_PAGE = Path(__file__).parent / "page.html"


class Service(Protocol):
    """What the routes need of the process that they run in."""

    config: ServeConfig
    keys: Keys
    limits: Limits
    metrics: Metrics
    dispatcher: Dispatcher

    async def status(self) -> dict[str, Any]:
        """Everything that the status page shows."""
        ...

    async def exposition(self) -> bytes:
        """Metrics of the whole service."""
        ...


def build(service: Service) -> FastAPI:
    """The application."""
    app = FastAPI(title="distill-ray", docs_url=None, redoc_url=None, openapi_url=None)
    gate = _Gate(service)
    _handle_errors(app, service)
    _add_answers(app, service, gate)
    _add_models(app, service, gate)
    _add_pages(app, service, gate)
    return app


# -- answers -----------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, service: Service, gate: _Gate) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest), responses=_RESPONSES)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        owner = gate.admit(request)
        checked, body = parse_request(await gate.body(request), ChatRequest, service.config.pass_fields)
        return await _answer(service, gate, _call(service, request, "chat", checked, body, owner))

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest), responses=_RESPONSES)
    async def completions(request: Request) -> Response:
        """Go on with a text. The student knows conversations only, so `auto` is the teacher."""
        owner = gate.admit(request)
        checked, body = parse_request(await gate.body(request), CompletionRequest, service.config.pass_fields)
        return await _answer(service, gate, _call(service, request, "completions", checked, body, owner))


def _call(
    service: Service,
    request: Request,
    method: Method,
    checked: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    owner: str,
) -> Call:
    wants = "auto" if checked.model in service.config.model_aliases else checked.model
    if wants not in ROUTES:
        raise ApiError(404, _unknown_model(service, checked.model), param="model", code="model_not_found")
    return Call(
        method=method,
        body=body,
        wants=wants,
        owner=owner,
        collect_header=request.headers.get("x-distill-collect"),
        idempotency_key=_idempotency_key(request),
    )


def _idempotency_key(request: Request) -> str | None:
    """Raises ApiError: 400, it is too long; two that begin alike would count as one if it were cut."""
    key = request.headers.get("idempotency-key") or None
    if key is not None and len(key) > MAX_KEY:
        raise ApiError(
            400, f"the header Idempotency-Key may have {MAX_KEY} characters, and has {len(key)}; send a shorter one"
        )
    return key


def _unknown_model(service: Service, name: str) -> str:
    known = ", ".join([*ROUTES, *service.config.model_aliases])
    return f"model {name!r} is not here; there are: {known} (serve.model_aliases adds names)"


async def _answer(service: Service, gate: _Gate, call: Call) -> Response:
    place = gate.enter()
    try:
        routed = await service.dispatcher.answer(call)
        headers = _headers(service, routed)
        if call.streams:
            response = StreamingResponse(
                _events(service, routed, place), media_type="text/event-stream", headers=headers
            )
            place = None  # the stream leaves it
            return response
        async with aclosing(routed.pieces) as pieces:
            answer = [piece async for piece in pieces]
        service.metrics.responses.labels("200").inc()
        return Response(json_bytes(answer[0]), headers=headers, media_type="application/json")
    finally:
        if place is not None:
            place.leave()


async def _events(service: Service, routed: Routed, place: _Place) -> AsyncGenerator[bytes, None]:
    """The stream. Its status line is sent already, so an error is an event, as OpenAI sends it."""
    status = "200"
    try:
        async with aclosing(routed.pieces) as pieces:
            async for piece in pieces:
                yield event(piece)
        yield DONE
    except ApiError as error:
        status = "broken"
        yield event(error.body)
    except (asyncio.CancelledError, GeneratorExit):
        status = "left"  # by the client
        raise
    finally:
        place.leave()
        service.metrics.responses.labels(status).inc()


def _headers(service: Service, routed: Routed) -> dict[str, str]:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    if service.config.headers:
        decision = routed.decision
        headers |= {"x-distill-route": decision.route, "x-distill-reason": decision.reason}
        headers |= {"x-distill-bundle": routed.version}
        if decision.similarity is not None:
            headers["x-distill-similarity"] = f"{decision.similarity:.4f}"
    return headers


# -- models ------------------------------------------------------------------------------------------------------------


def _add_models(app: FastAPI, service: Service, gate: _Gate) -> None:
    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "distill-ray"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """What `model` may be."""
        gate.owner(request)
        names = [*ROUTES, *service.config.model_aliases]
        return JSONResponse({"object": "list", "data": [card(name) for name in names]})

    @app.get("/v1/models/{name:path}", responses={404: {"description": "no such model"}})
    async def model(name: str, request: Request) -> Response:
        """One of them."""
        gate.owner(request)
        if name not in (*ROUTES, *service.config.model_aliases):
            raise ApiError(404, _unknown_model(service, name), code="model_not_found")
        return JSONResponse(card(name))


# -- pages -------------------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI, service: Service, gate: _Gate) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether this router answers, with which bundle, and whether with its student."""
        live = service.dispatcher.live
        return JSONResponse({"status": "ok", "bundle": live.version, "student_up": live.student is not None})

    @app.get("/openapi.json", include_in_schema=False)
    async def schema(request: Request) -> Response:
        """What this service can be asked."""
        gate.owner(request)
        return JSONResponse(app.openapi())

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        gate.owner(request)
        return Response(await service.exposition(), media_type=CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse)
    async def page(request: Request) -> Response:
        """The status page."""
        gate.owner(request, page=True)
        return HTMLResponse(status_page(), headers=_PAGE_HEADERS)

    @app.get("/status.json")
    async def status(request: Request) -> Response:
        """What the status page shows."""
        gate.owner(request, page=True)
        return JSONResponse(await service.status(), headers={"cache-control": "no-store"})

    @app.post("/route", openapi_extra=_body_of(ChatRequest), responses=_RESPONSES)
    async def route(request: Request) -> Response:
        """Which way a conversation would go, and why; nobody is asked."""
        owner = gate.owner(request, page=True)
        checked, body = parse_request(await gate.body(request), ChatRequest, service.config.pass_fields)
        call = _call(service, request, "chat", checked, body, owner)
        return JSONResponse(await service.dispatcher.explain(call))


def status_page() -> str:
    """The file that `/` sends."""
    return _PAGE.read_text(encoding="utf-8").replace("/* look.css */", LOOK)


_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


# -- who may come in ---------------------------------------------------------------------------------------------------


class _Place:
    """A request in work."""

    def __init__(self, gate: _Gate) -> None:
        self._gate: _Gate | None = gate

    def leave(self) -> None:
        if self._gate is not None:
            self._gate.num_inside -= 1
            self._gate = None

    def __del__(self) -> None:
        self.leave()  # of a stream whose client was gone before it began


class _Gate:
    """Keys, limits and sizes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.num_inside = 0

    def owner(self, request: Request, *, page: bool = False) -> str:
        """Whose request it is. Raises ApiError: 401, 403."""
        host = _host_of(request.headers.get("host") or "")
        if self._service.config.host in LOOPBACK and host not in LOOPBACK:
            raise ApiError(403, f"this service answers on loopback only, not as {host!r}", "permission_error")
        authorization = request.headers.get("authorization")
        return self._service.keys.owner(_from_basic(authorization) if page else authorization)

    def admit(self, request: Request) -> str:
        """The owner of a request that may be answered. Raises ApiError: 401, 403, 415, 429."""
        owner = self.owner(request)
        self._service.limits.admit(owner)
        return owner

    def enter(self) -> _Place:
        """A place among the requests in work. Raises ApiError: 503, there is none."""
        router = self._service.config.router
        if self.num_inside >= router.max_ongoing + router.max_queued:
            raise ApiError(503, "too many requests at once", "server_error", code="busy", retry_after=BUSY_RETRY_S)
        self.num_inside += 1
        return _Place(self)

    async def body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError: 413, 415."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with the header `Content-Type: application/json`")
        most = int(self._service.config.router.max_body_mb * 1e6)
        too_large = ApiError(413, f"a request may have {most} bytes", code="request_too_large")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise too_large
        return bytes(data)


def _host_of(header: str) -> str:
    """The name in a Host header, without port, brackets and the root's dot: `localhost.` is `localhost`."""
    try:
        return (urlsplit(f"//{header}").hostname or "").removesuffix(".")
    except ValueError:  # brackets without an address in them
        return ""


def _from_basic(authorization: str | None) -> str | None:
    """A browser knows a name and a password: the password is the key."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        return "Bearer " + base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None


# -- errors ------------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI, service: Service) -> None:
    def respond(error: ApiError, headers: dict[str, str] | None = None) -> Response:
        headers = headers or {}
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
        service.metrics.responses.labels(str(error.status)).inc()
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        asks = error.status == 401 and request.url.path in ("/", "/status.json", "/route")
        return respond(error, {"www-authenticate": 'Basic realm="distill-ray: any name, your API key"'} if asks else {})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return respond(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def any_error(request: Request, error: Exception) -> Response:
        _LOG.error("a bug: %s in %s", type(error).__name__, request.url.path, exc_info=error)
        service.metrics.errors.labels("router").inc()
        return respond(ApiError(500, "something is wrong with this service; its log has more", "server_error"))


_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "the request is wrong",
        401: "no key, or an unknown one",
        403: "not from here",
        404: "no such model",
        413: "too large",
        415: "not JSON",
        429: "too many requests, or the day's tokens are spent",
        503: "nobody can answer now",
    }.items()
}


def _body_of(kind: type[ChatRequest] | type[CompletionRequest]) -> dict[str, Any]:
    """The schema of a body that this module parses itself: FastAPI would read it whole before it looks at its size."""
    schema = kind.model_json_schema()
    schema["properties"] |= {name: {} for name in sorted(HANDED_ON[kind])}
    schema["additionalProperties"] = False
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for _ in range(4):  # definitions refer to others
        for name, definition in definitions.items():
            text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": json.loads(text)}}}}
