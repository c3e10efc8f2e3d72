"""A router process: the HTTP face, the dispatcher, and three loops beside them.

    watch    what is current -> load its bundle, wait for its student, swap both at once
    report   what this router counted -> keeper -> what all routers counted
    ship     spool -> keeper -> store

None of the loops is on a request's way: with the keeper gone, requests are answered as before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from distill_ray.config import ContextRecipeConfig, OpenAIEngineConfig, RunConfig
from distill_ray.errors import BundleError, ServingError, SpoolError, SpoolFull
from distill_ray.records import Message
from distill_ray.recipes.context import ContextRecipe
from distill_ray.serving.answer import Answer
from distill_ray.serving.backends import Backend, RemoteBackend
from distill_ray.serving.bundle import Bundle, load_bundle
from distill_ray.serving.bundles import Bundles
from distill_ray.serving.dispatch import Asked, Dispatcher, Live
from distill_ray.serving.embedder import BatchedEmbedder, load_embedder
from distill_ray.serving.ingress import build
from distill_ray.serving.keys import load_keys
from distill_ray.serving.limits import Entry, Limits
from distill_ray.serving.metrics import Metrics, exposition
from distill_ray.serving.models import DeployedBackend, is_remote
from distill_ray.serving.names import AppNames
from distill_ray.serving.pairs import make_pair, why_not_kept
from distill_ray.serving.spool import Spool

WATCH_S, REPORT_S = 1.0, 1.0
KEEPER_TIMEOUT_S = 30.0
INHERIT_EVERY = 30  # rounds of `ship`
_LOG = logging.getLogger("distill_ray.serving")
