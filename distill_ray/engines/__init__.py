"""Engines answer conversations. Recipes see only `engines.base.Engine`; `type:` picks the class.

| `type:`  | what answers                                        | top_logprobs    | structured        |
|----------|-----------------------------------------------------|-----------------|-------------------|
| `vllm`   | vLLM in this process, GPU or CPU                    | with token ids  | yes               |
| `openai` | any OpenAI-compatible URL                           | ids if it gives | if the server can |
| `hf`     | transformers `generate`: encoder-decoder, small     | no              | no                |
| `fake`   | a Jinja template: tests, dry runs, breaking things  | no              | `choice`          |
| `none`   | nobody: the answers are in the data                 |                 |                   |

A teacher may be a mixture of them (`mixture.py` says which one answers a row).

All of them: n samples in order, `first_sample` continues a series, token usage (the prompt is counted on the
first sample of a call), own retries for what may pass, errors from `distill_ray.errors`. One contract suite
runs on all: `tests/integration/test_engine_contract.py`. They differ in one thing that a user can meet: text
that spells a control token is plain text for `vllm`, `hf` and `fake`, and is rejected (`control_tokens`) by
`openai`, which cannot promise it.

Importing this package loads no vllm, torch or openai; building an engine loads its own module only.
"""

from __future__ import annotations

import socket
from importlib import import_module

from distill_ray import plugins
from distill_ray.config.engine import EngineConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import ConfigError

__all__ = ["Engine", "make_engine"]

# type -> (module, class): imported when one is built, so that a run pays only for the engine that it uses.
ENGINE_CLASSES: dict[str, tuple[str, str]] = {
    "vllm": ("distill_ray.engines.vllm", "VllmEngine"),
    "openai": ("distill_ray.engines.openai", "OpenAIEngine"),
    "hf": ("distill_ray.engines.hf", "HfEngine"),
    "fake": ("distill_ray.engines.fake", "FakeEngine"),
    "none": ("distill_ray.engines.none", "NoEngine"),
}


def make_engine(config: EngineConfig) -> Engine:
    """Build the engine that `config.type` names, here or in another package (`distill_ray.plugins`).

    Cheap: no model is loaded before `start`.

    Raises:
        ConfigError: the package that it needs is not installed.
    """
    if config.type not in ENGINE_CLASSES:
        return plugins.make(plugins.Group.ENGINES, config, Engine)
    module, name = ENGINE_CLASSES[config.type]
    try:
        engine_class = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"type: {config.type} needs the package {error.name}, which is not installed on {socket.gethostname()}; "
            "run `make install` there, or choose another engine type"
        ) from error
    return engine_class(config)
