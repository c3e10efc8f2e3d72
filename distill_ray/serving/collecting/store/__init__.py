"""Where collected pairs are kept: a class per `serve.collect.store.type`, and the one way to open it."""

from __future__ import annotations

import os
from pathlib import Path

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import ConfigError, StoreError
from distill_ray.serving.collecting.store.base import ALL, Deletion, Lease, PairStore, Selection, Where

__all__ = ["ALL", "Deletion", "Lease", "PairStore", "Selection", "Where", "existing_store", "make_store"]


def make_store(config: StoreConfig, folder: str | Path) -> PairStore:
    """Open the store of pairs. Nothing is written, and nothing asked of a server, until it is used.

    Args:
        config: `serve.collect.store`.
        folder: of the service, where pairs are kept unless the config says otherwise.

    Raises:
        ConfigError: the variable with its key is not set.
    """
    return _STORES[config.type](config, folder)


def existing_store(config: StoreConfig, folder: str | Path) -> PairStore:
    """Open the store for somebody who only looks at what the service wrote.

    A service's own folder may well have nothing in it yet. An address that somebody gave is rather a wrong one then,
    and it would be wrong to say that nothing was collected, or to leave something there.

    Raises:
        ConfigError: as for `make_store`.
        StoreError: nothing was ever stored where the config says; or the store cannot be used.
    """
    store = make_store(config, folder)
    if config.url is not None and not store.exists():
        raise StoreError(
            f"{config.url}: no pairs are stored there yet; is serve.collect.store right (collection: "
            f"{config.collection}), and has the service answered anything?"
        )
    return store


def _lance(config: StoreConfig, folder: str | Path) -> PairStore:
    from distill_ray.serving.collecting.store.lance import LanceStore

    return LanceStore(config.url or str(Path(folder) / "pairs"), config.collection)


def _qdrant(config: StoreConfig, folder: str | Path) -> PairStore:
    from qdrant_client import QdrantClient

    from distill_ray.serving.collecting.store.qdrant import QdrantStore

    del folder
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(f"serve.collect.store.api_key_env: {config.api_key_env} is not set; export the key")
    client = QdrantClient(url=config.url, api_key=key, timeout=10, check_compatibility=False)
    return QdrantStore(client, config.collection)


_STORES = {"lance": _lance, "qdrant": _qdrant}
