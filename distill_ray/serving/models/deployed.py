"""A model in this cluster, as the router sees it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from functools import cached_property
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from distill_ray.errors import ApiError
from distill_ray.serving.backends import UP_S, Backend, Method
from distill_ray.serving.front.wire import error_of

_LOG = logging.getLogger("distill_ray.serving")


class DeployedBackend(Backend):
    """A model that is a Serve application.

    Args:
        app: name of the application.
        name: what answers, for people and for the store.
    """

    is_here = True

    def __init__(self, app: str, name: str) -> None:
        self.app, self.name = app, name

    @cached_property
    def _handle(self) -> DeploymentHandle:
        return serve.get_app_handle(self.app)

    async def is_up(self) -> bool:
        """Whether a replica answers."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            async with asyncio.timeout(UP_S):
                await self._handle.ping.remote()
        except (RayError, RayServeException, TimeoutError):
            return False
        return True

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.answer`."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        pieces: Any = None
        try:
            pieces = self._handle.options(stream=True).answer.remote(method, dict(body))
            async for data in pieces:
                piece = json.loads(data)
                if "error" in piece:
                    error = error_of(piece.pop("status", 500), piece)
                    error.message = error.message.replace(self.app, "the model")  # which one is the operator's
                    raise error
                yield piece
        except RayTaskError as error:  # something in it failed, and it is still there; unless that was its engine
            code = "gone" if "EngineDead" in type(error.cause).__name__ else None
            _LOG.warning("%s failed: %s", self.name, type(error.cause).__name__)
            raise ApiError(500, "the model failed on this request", "server_error", code=code) from error
        except (RayError, RayServeException) as error:
            _LOG.warning("%s does not answer: %s", self.name, type(error).__name__)
            raise ApiError(503, "the model does not answer", "server_error", code="gone") from error
        finally:
            if pieces is not None:
                pieces.cancel()  # ends the work where the client has left; nothing where it is done
