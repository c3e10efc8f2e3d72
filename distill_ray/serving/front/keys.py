"""API keys: who asks. Only hashes are stored, and every stored one is compared, in constant time.

Keys are 256 random bits, so a plain SHA-256 of one cannot be searched back; a password would need more.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill_ray.config.serve import KeysConfig
from distill_ray.errors import ApiError, ConfigError

PREFIX = "dr-"
ANYBODY = "anybody"  # the owner of a request where no key is required
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_OWNER = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True)
class Key:
    """A stored key."""

    owner: str
    digest: str  # SHA-256, hex


class Keys:
    """The keys of a service.

    Args:
        keys: all of them.
        required: whether a request needs one.
    """

    def __init__(self, keys: list[Key], *, required: bool) -> None:
        self._keys, self.required = keys, required

    def owner(self, authorization: str | None) -> str:
        """Whose request this is, from its Authorization header. Raises ApiError: 401."""
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            if self.required:
                raise _refused("no API key; send the header `Authorization: Bearer KEY`")
            return ANYBODY
        digest, owner = digest_of(given), None
        for key in self._keys:  # all of them, whatever was found
            if hmac.compare_digest(key.digest, digest):
                owner = key.owner
        if owner is None:
            if self.required:
                raise _refused("this API key is not known here")
            return ANYBODY  # a client that must send something
        return owner


def _refused(message: str) -> ApiError:
    return ApiError(401, message, "authentication_error", code="invalid_api_key")


def digest_of(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def load_keys(config: KeysConfig, default_file: str, host: str, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the file and of the environment.

    Raises:
        ConfigError: one of them cannot be read; or keys are required, and there is none.
    """
    path = Path(config.file or default_file)
    keys = _from_environment(environment.get(config.env, ""), config.env)
    if config.file is not None or path.exists():
        keys += read_keys(path)
    required = config.required if config.required is not None else bool(keys) or host not in LOOPBACK
    if required and not keys:
        raise ConfigError(
            f"serve.keys: {host} needs API keys and there are none; make one with `distill-ray keys add CONFIG OWNER`, "
            f"set {config.env}, or set `serve.keys.required: false` if anybody who reaches this address may ask"
        )
    return Keys(keys, required=required)


def _from_environment(text: str, name: str) -> list[Key]:
    keys = []
    for number, entry in enumerate((entry for entry in text.split(",") if entry.strip()), start=1):
        owner, _, key = entry.strip().partition(":")
        if not _OWNER.fullmatch(owner) or len(key) < 16:
            raise ConfigError(f"{name}: entry {number} is not OWNER:KEY with a key of at least 16 characters")
        keys.append(Key(owner, digest_of(key)))
    return keys


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises ConfigError: it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file, so there are no keys; make one with `distill-ray keys add CONFIG OWNER`, or set "
            "serve.keys.file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serve.keys.file: cannot read {path} ({error})") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key = Key(entry["owner"], entry["sha256"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f'{path}, line {number}: not {{"owner": ..., "sha256": ...}}') from error
        if not isinstance(key.digest, str) or not re.fullmatch(r"[0-9a-f]{64}", key.digest):
            raise ConfigError(
                f"{path}, line {number}: sha256 is not 64 hex digits; the key itself does not belong here"
            )
        keys.append(key)
    return keys


def add_key(path: Path, owner: str) -> str:
    """Make a key for `owner`, store its hash, and return it: nobody can read it again.

    Raises:
        ConfigError: the name or the file cannot be used.
    """
    if not _OWNER.fullmatch(owner):
        raise ConfigError(f"{owner!r}: an owner is up to 64 letters, digits, dots, dashes or @")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(_line(Key(owner, digest_of(key))))
    except OSError as error:
        raise ConfigError(f"{path}: cannot write ({error.strerror})") from error
    return key


def remove_keys(path: Path, owner: str, prefix: str = "") -> int:
    """Remove the keys of `owner` whose hash begins with `prefix`; returns how many.

    Raises:
        ConfigError: there is none, or the file cannot be used.
    """
    keys = read_keys(path)
    kept = [key for key in keys if key.owner != owner or not key.digest.startswith(prefix)]
    if len(kept) == len(keys):
        there = ", ".join(f"{key.owner} {key.digest[:12]}" for key in keys) or "none"
        which = f"{owner!r} with a hash that begins with {prefix!r}" if prefix else repr(owner)
        raise ConfigError(f"{path}: no key of {which}; there are: {there}")
    scratch = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(_line(key) for key in kept)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot write ({error.strerror})") from error
    return len(keys) - len(kept)


def _line(key: Key) -> str:
    return json.dumps({"owner": key.owner, "sha256": key.digest}) + "\n"
