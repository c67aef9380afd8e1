"""Which errors may be gone in a moment, and trying again after them.

There is one layer of retries, with waits that end. Each store's package knows its own transient
errors but neither those of the others nor of a network's file system, and retries by one of them
(botocore's, tenacity's) would still need this list: so the list is here, and the loop with it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Waits between the tries of a request: a store that throttles is back within seconds."""

TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENOBUFS"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "EPIPE", "ESHUTDOWN"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
    )
) | {socket.EAI_AGAIN}
"""Numbers of the system's errors that may be gone in a moment: a network's, or a server's."""

TRANSIENT_CLASSES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "asyncio": {"IncompleteReadError"},
    "botocore": {"ConnectionError", "HTTPClientError", "IncompleteReadError"},
    "gcsfs": {"ChecksumError"},
    "google": {"TransportError"},
    "http": {"HTTPException"},
    "httpcore": {"NetworkError", "ProtocolError", "TimeoutException"},
    "httpx": {"TransportError"},
    "requests": {"ChunkedEncodingError", "ConnectionError", "Timeout"},
    "urllib3": {"NewConnectionError", "ProtocolError", "TimeoutError"},
}
"""Classes of the packages behind fsspec that say so, by package; what derives from them too."""

PERMANENT_CLASSES = {"ClientConnectorCertificateError", "ClientSSLError", "SSLError"}
"""Of those again: what is wrong with a certificate stays wrong."""

CONFLICTS = (409, 412)
"""Somebody else wrote at the same moment: on a hub every writer commits to one repository."""

TRANSIENT_STATUS = (408, 425, 429, *CONFLICTS)
TRANSIENT_CODES = (
    *("RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "InternalError"),
    *("XAmzContentSHA256Mismatch", "ServiceUnavailable", "OperationAborted"),
)
"""Of S3, some of which come with a status that says that the request was wrong."""

T = TypeVar("T")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed in a moment. What is not known is not transient."""
    status, code = status_of(error)
    if code in TRANSIENT_CODES:
        return True
    if isinstance(status, int):
        return status >= 500 or status in TRANSIENT_STATUS
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if any(name in PERMANENT_CLASSES for _, name in kinds):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if type(error) is OSError and error.errno is None:
        return True  # of a transfer: cut short, or not what was sent
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return any(name in TRANSIENT_CLASSES.get(package, ()) for package, name in kinds)


def patiently(work: Callable[[], T]) -> T:
    """What ``work`` gives, tried again (``WAITS_S``) where the system's error is a passing one.

    For files on a network's file system; addresses have their own retries (``RemoteFolder``).
    """
    for wait in WAITS_S:
        try:
            return work()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                raise
        time.sleep(wait * jitter())
    return work()


def status_of(error: Exception) -> tuple[int | None, str]:
    """Status and code of the answer that an error is about, as far as the backend kept them."""
    if isinstance(status := getattr(error, "status", None), int):
        return status, ""
    for of in (error, error.__cause__):
        answer = getattr(of, "response", None)
        if isinstance(answer, dict):  # botocore's
            meta = answer.get("ResponseMetadata", {})
            return meta.get("HTTPStatusCode"), str(answer.get("Error", {}).get("Code", ""))
        if isinstance(status := getattr(answer, "status_code", None), int):
            return status, ""
    return None, ""


def jitter() -> float:
    """Between 0.75 and 1.25, by process: a hundred workers shall not all come back at once."""
    return 0.75 + 0.5 * (os.getpid() % 101) / 100
