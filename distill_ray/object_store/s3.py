"""S3 as s3fs has it, with one patience for whatever is asked, and errors that say what to do.

By themselves s3fs and botocore ask again one inside the other: five times five for each request, and that five times
more where a file is read, so a store that stalls was given up after half an hour; but a 500 only five times, and a
large file that broke off not at all. Here each request is asked again by `_patiently` alone, and s3fs goes on where the
body of an answer broke off.

A request that seemed to fail may have been done. All that is asked here can be done twice; who writes on a condition
(`serving/numbered.py`) knows its own content again.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
)
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS
from s3fs.errors import translate_boto_error

from distill_ray.errors import first_line
from distill_ray.object_store import ObjectStoreError, refused

T = TypeVar("T")

PAUSES_S = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4, 6.4)
"""Before each other try, at most; half of it is chance, so that not all nodes come back at once."""

TRIES = len(PAUSES_S) + 1
TRIES_UNREACHED = 6  # nobody there: five seconds
TRIES_STALLED = 4  # each takes `read_timeout`
READS = 3  # of a large file as a whole

# Beside all of 500 and more.
_PASSING = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "TooManyRequests", "429"}
_REMARK = re.compile(r" \(reached max retries: \d+\)")
_UNREACHED = (ConnectionError, ConnectTimeoutError)
_BROKEN_OFF = (*S3_RETRYABLE_ERRORS, HTTPClientError)


class PatientS3(S3FileSystem):
    """See above. Constructed as any other, so that it travels between processes.

    Raises FileNotFoundError and FileExistsError as every file system; ObjectStoreError (an OSError too): the bucket is
    not there, nobody may do this, or the store is away.
    """

    read_timeout = 30  # until an answer begins: s3fs's 15 are short for a part of 50 MB on a slow line

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        return {"retries": {"total_max_attempts": 1}, **super()._prepare_config_kwargs()}

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:
        is_again = False

        async def once() -> Any:
            nonlocal is_again
            await self.set_session()
            ask = getattr(await self.get_s3(named.get("Bucket")), method)
            try:
                return await ask(**self._get_s3_method_kwargs(ask, *arguments, **named))
            except ClientError as error:
                if is_again and method == "complete_multipart_upload" and _code(error) == "NoSuchUpload":
                    return {}  # it was complete the time before, and the answer was lost
                raise
            finally:
                is_again = True

        return await _patiently(once, named.get("Bucket", ""))

    call_s3 = sync_wrapper(_call_s3)  # s3fs's own is bound to its own

    # A large file comes in parts, and s3fs does not go on where one of them breaks off.

    async def _cat_file(self, path: str, *arguments: Any, **named: Any) -> Any:
        read = super()._cat_file
        return await _patiently(lambda: read(path, *arguments, **named), path, READS)

    async def _get_file(self, rpath: str, lpath: str, *arguments: Any, **named: Any) -> Any:
        get = super()._get_file
        return await _patiently(lambda: get(rpath, lpath, *arguments, **named), rpath, READS)


async def _patiently(ask: Callable[[], Awaitable[T]], where: str, most: int = TRIES) -> T:
    """Ask, and again as long as what was wrong may pass."""
    tries = 0
    while True:
        try:
            return await ask()
        except Exception as error:
            tries += 1
            if tries >= min(most, _worth(error)):
                if (said := _in_words(error, where, tries)) is error:
                    raise
                raise said from error
        await asyncio.sleep(PAUSES_S[tries - 1] * random.uniform(0.5, 1.0))


def _worth(error: Exception) -> int:
    """How many tries."""
    if isinstance(error, ClientError):
        return TRIES if _status(error) >= 500 or _code(error) in _PASSING else 1
    if isinstance(error, _UNREACHED):
        return TRIES_UNREACHED
    if isinstance(error, ReadTimeoutError):
        return TRIES_STALLED
    return TRIES if isinstance(error, _BROKEN_OFF) else 1


def _in_words(error: Exception, where: str, tries: int) -> Exception:
    """What to raise: where there is something to do, an error that says what."""
    bucket = where.split("/", 1)[0]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return ObjectStoreError(
            "no credentials for it in the environment; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "or give the machine a role"
        )
    if isinstance(error, ParamValidationError):
        return ObjectStoreError(f"{bucket!r} is no name of a bucket; an address is s3://BUCKET/FOLDER")
    if _worth(error) > 1:
        why = _REMARK.sub("", first_line(error))
        return ObjectStoreError(
            f"the store failed {tries} times, last with: {why}; check that it is up, and the address "
            "(AWS_ENDPOINT_URL, where it is not Amazon's)"
        )
    if not isinstance(error, ClientError):
        return error
    if _code(error) == "NoSuchBucket":
        return ObjectStoreError(f"there is no bucket {bucket!r}; create it, or correct the address")
    if _status(error) == 301:
        return ObjectStoreError(f"the bucket {bucket!r} is in another region; set AWS_DEFAULT_REGION to its own")
    if _status(error) in (401, 403):
        return refused(f"{error.operation_name} ({_code(error)})", repr(bucket))
    return translate_boto_error(error)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
