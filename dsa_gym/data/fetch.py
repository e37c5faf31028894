"""Files from the web, under limits: bytes, seconds, redirects and downloads at a time.

A table of addresses from the web is not to be trusted: a server may never answer, send a byte per second or
never stop. Every wait is therefore bounded by what is left of the file's total time.
"""

from __future__ import annotations

import functools
import http.client
import io
import math
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from dsa_gym.data.tables import DataError

__all__ = ["DownloadError", "DownloadLimits", "fetch", "fetch_all"]

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
# What `quote` would escape but an address needs, and "%": what is escaped already stays.
_SAFE = "%/:=&?~#+!$,;'@()*[]"


class DownloadError(DataError):
    """A file could not be downloaded.

    Attributes:
        reason: few words to count failures by, such as ``"download timed out"``.
    """

    def __init__(self, reason: str, url: str, detail: object) -> None:
        super().__init__(f"{reason}: {url}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class DownloadLimits:
    """Limits on downloads.

    Attributes:
        max_bytes: Largest file, in bytes.
        timeout: Longest wait for a connection and for the next bytes, in seconds.
        total_timeout: Longest time for one file, redirects included, in seconds.
        max_redirects: Redirects followed for one file.
        workers: Downloads at a time.
    """

    max_bytes: int = 10_000_000
    timeout: float = 10.0
    total_timeout: float = 30.0
    max_redirects: int = 5
    workers: int = 8

    def __post_init__(self) -> None:
        for name in ("max_bytes", "timeout", "total_timeout", "workers"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected a positive, finite number")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects={self.max_redirects}: expected 0 or more")


def fetch(url: str, limits: DownloadLimits | None = None) -> bytes:
    """Download one file over http or https; proxies are taken from the environment.

    The limits do not cover the look-up of the host's name, which is bounded by the operating system.

    Raises:
        DownloadError: The address is not http or https, also after a redirect; the server does not answer,
            refuses, or is slower than the limits; or the file is larger than they allow.
    """
    limits = limits or DownloadLimits()
    deadline = time.monotonic() + limits.total_timeout
    start = url
    try:
        for _ in range(limits.max_redirects + 1):
            if urlsplit(url).scheme not in ("http", "https"):
                raise DownloadError("not http or https", start, url)
            with _opened(url, limits.timeout, deadline) as response:
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    return _body(response, start, limits.max_bytes)
                url = urljoin(url, response.headers["Location"])
    except DownloadError:
        raise
    # ValueError: whatever urllib and http.client think of a malformed address or answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
        raise DownloadError("download timed out" if late else "download failed", start, error) from error
    raise DownloadError("download failed", start, f"more than {limits.max_redirects} redirects")


def fetch_all(
    urls: Iterable[str | None], limits: DownloadLimits | None = None
) -> Iterator[bytes | DownloadError | None]:
    """Download many files at a time and yield their bytes, or what went wrong, in the order of `urls`.

    `urls` is read a few ahead of what is yielded: neither it nor the files need to fit in memory.

    Args:
        urls: Addresses; None is yielded as None.
        limits: Limits of every file, and how many are downloaded at a time.
    """
    limits = limits or DownloadLimits()
    waiting: deque[Future[bytes | DownloadError] | None] = deque()
    pool = ThreadPoolExecutor(limits.workers, thread_name_prefix="fetch")
    try:
        for url in urls:
            waiting.append(None if url is None else pool.submit(_fetch_or_error, url, limits))
            if len(waiting) > 2 * limits.workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_or_error(url: str, limits: DownloadLimits) -> bytes | DownloadError:
    try:
        return fetch(url, limits)
    except DownloadError as error:
        return error


def _result(future: Future[bytes | DownloadError] | None) -> bytes | DownloadError | None:
    return None if future is None else future.result()


def _body(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
    """The content of an answer, read only as far as the limit."""
    if response.status != 200:
        raise DownloadError("download failed", url, f"HTTP status {response.status}")
    if response.length is not None and response.length > max_bytes:
        raise DownloadError("download too large", url, f"{response.length} bytes, the limit is {max_bytes}")
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise DownloadError("download too large", url, f"more than the limit of {max_bytes} bytes")
    if response.length:
        raise DownloadError("download failed", url, f"the connection was closed {response.length} bytes too early")
    return bytes(content)


def _opened(url: str, timeout: float, deadline: float) -> http.client.HTTPResponse:
    """The answer to one request, whatever its status."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    # Not `build_opener`: that follows redirects by itself, to ftp too, and reads their bodies to the end.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Http(timeout, deadline), _Https(timeout, deadline)):
        opener.add_handler(handler)
    request = urllib.request.Request(quote(url, safe=_SAFE), headers={"User-Agent": "dsa-gym", "Accept": "image/*,*/*"})
    response: http.client.HTTPResponse = opener.open(request, timeout=min(timeout, left))
    return response


class _Http(urllib.request.HTTPHandler):
    """Opens http addresses, with a deadline."""

    def __init__(self, timeout: float, deadline: float) -> None:
        super().__init__()
        self.limits = timeout, deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connecting(http.client.HTTPConnection, *self.limits), req)


class _Https(urllib.request.HTTPSHandler):
    """Opens https addresses, with a deadline."""

    def __init__(self, timeout: float, deadline: float) -> None:
        super().__init__(context=_tls())
        self.limits = timeout, deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connecting(http.client.HTTPSConnection, *self.limits), req, context=_tls())


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's certificates, loaded once: that takes longer than a small file."""
    return ssl.create_default_context()


def _connecting(kind: type[http.client.HTTPConnection], timeout: float, deadline: float) -> Any:
    """What makes connections of this kind whose answers are read up to the deadline."""

    def connect(host: str, **settings: Any) -> http.client.HTTPConnection:
        connection = kind(host, **settings)
        connection.response_class = functools.partial(_Answer, timeout, deadline)  # type: ignore[assignment]
        return connection

    return connect


class _Answer(http.client.HTTPResponse):
    """An answer whose status line, headers and body must all arrive before the deadline."""

    def __init__(self, timeout: float, deadline: float, sock: Any, *args: Any, **settings: Any) -> None:
        super().__init__(sock, *args, **settings)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock.settimeout, timeout, deadline))


class _Until(io.RawIOBase):
    """Bytes of a socket; every wait is at most the timeout, and at most what is left until the deadline."""

    def __init__(self, raw: Any, set_timeout: Callable[[float], None], timeout: float, deadline: float) -> None:
        self.raw, self.set_timeout, self.timeout, self.deadline = raw, set_timeout, timeout, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        self.set_timeout(min(self.timeout, left))
        count: int | None = self.raw.readinto(buffer)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()
