"""An OpenAI-compatible HTTP server on loopback that answers, or misbehaves, by a script. Standard library.

    with ScriptedServer([Reply(429, headers={"retry-after": "1"}), Reply(500)]) as server:
        ...  # first request 429, second 500, every further one is answered properly
    server.chats  # the bodies that came

It runs an event loop of its own in a thread, so the code under test may block or use any loop.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_WORDS = 1024  # prompts above are refused as too long


@dataclass
class Reply:
    """What to send. `body`: a dict goes out as JSON, text as it is."""

    status: int = 200
    body: Mapping[str, Any] | str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hang_s: float = 0.0  # seconds of silence first
    close: bool = False  # end the connection instead of answering


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


ChatFunction = Callable[[dict[str, Any]], Reply]


def answer_chat(body: dict[str, Any], **message: Any) -> Reply:
    """A well-behaved answer: words from the last message, n samples, usage, logprobs where asked.

    Args:
        body: the request.
        message: fields that replace those of the answer's message.
    """
    words = " ".join(m["content"] for m in body["messages"]).split()
    if len(words) > MAX_WORDS:
        return error(400, f"This model's maximum context length is {MAX_WORDS} tokens.", "context_length_exceeded")
    choices = [_choice(body, i, message) for i in range(body.get("n", 1))]
    usage = {
        "prompt_tokens": len(words),
        "completion_tokens": sum(len(str(c["message"]["content"] or "").split()) for c in choices),
    }
    return Reply(body={"id": "x", "object": "chat.completion", "choices": choices, "usage": usage})


def _choice(body: dict[str, Any], index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    drawn = f" seed {body['seed'] + index}" if body["temperature"] > 0 else ""
    text = f"echo: {body['messages'][-1]['content']}{drawn}"
    choice: dict[str, Any] = {
        "index": index,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    if body.get("logprobs"):
        tops = [{"token": f"t{k}", "logprob": -0.5 - k} for k in range(body["top_logprobs"])]
        choice["logprobs"] = {"content": [{"token": w, "logprob": -0.5, "top_logprobs": tops} for w in text.split()]}
    return choice


def error(status: int, message: str, code: str = "", **headers: str) -> Reply:
    """An error as OpenAI's servers send it."""
    return Reply(status, {"error": {"message": message, "code": code, "type": "", "param": None}}, headers)


class ScriptedServer:
    """See the module docstring.

    Args:
        script: replies to the first chat requests, in order.
        chat: answers the chat requests after the script.
        models: reply to GET /v1/models.
        latency_s: seconds that each chat takes.
    """

    def __init__(
        self,
        script: Iterable[Reply] = (),
        *,
        chat: ChatFunction = answer_chat,
        models: Reply | None = None,
        latency_s: float = 0.0,
    ) -> None:
        self.script = list(script)
        self.chat = chat
        self.models = models or Reply(body={"object": "list", "data": [{"id": "m", "object": "model"}]})
        self.latency_s = latency_s
        self.requests: list[Request] = []
        self.num_in_flight = 0
        self.most_in_flight = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests so far."""
        return [request.body for request in self.requests if request.path.endswith("/chat/completions")]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.port), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read_request(reader):
                self.requests.append(request)
                reply = await self._reply(request)
                if reply.close:
                    break
                writer.write(_encode(reply))
                await writer.drain()
        except ConnectionError:
            pass  # the client gave up, as it does on a time-out
        finally:
            writer.close()

    async def _reply(self, request: Request) -> Reply:
        if request.path.endswith("/models"):
            await asyncio.sleep(self.models.hang_s)
            return self.models
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            reply = self.script.pop(0) if self.script else self.chat(request.body)
            await asyncio.sleep(reply.hang_s + self.latency_s)
        finally:
            self.num_in_flight -= 1
        return reply


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None  # the client closed the connection
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, json.loads(body) if body else {})


def _encode(reply: Reply) -> bytes:
    body = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
