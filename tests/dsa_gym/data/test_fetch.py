"""Downloads against a server on loopback: whatever it does, a download ends in time and says how."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dsa_gym.data import fetch as fetch_module
from dsa_gym.data.fetch import DownloadError, DownloadLimits, fetch, fetch_all

LIMITS = DownloadLimits(max_bytes=1000, timeout=0.3, total_timeout=0.5, max_redirects=3, workers=4)
HOST = "127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    """The address says what to do, for example `/drip`."""

    server: Server

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client gave up, as it should
            getattr(self, "do_" + self.path.strip("/").split("/")[0])()
        self.close_connection = True

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_ok(self) -> None:
        body = self.path.encode()
        self.answer(body, Content_Length=str(len(body)))

    def do_chunked(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.answer(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", Transfer_Encoding="chunked")

    def do_missing(self) -> None:
        self.answer(b"no such page", 404)

    def do_slow(self) -> None:
        time.sleep(0.1)
        self.do_ok()

    def do_large(self) -> None:
        self.answer(b"", Content_Length="1001")

    def do_endless(self) -> None:
        self.answer(b"")
        while True:
            self.wfile.write(bytes(1000))

    def do_hang(self) -> None:
        self.server.stop.wait(5)

    def do_drip(self) -> None:
        self.answer(b"", Content_Length="900")
        self.drip(b"x")

    def do_dripheaders(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        self.drip(b"A: b\r\n")

    def do_dripstatus(self) -> None:
        self.drip(b"H")

    def drip(self, piece: bytes) -> None:
        """Something every 0.05 seconds: never long enough without bytes to time out."""
        while not self.server.stop.wait(0.05):
            self.wfile.write(piece)
            self.wfile.flush()

    def do_short(self) -> None:
        self.answer(b"only this", Content_Length="900")

    def do_nonsense(self) -> None:
        self.wfile.write(b"this is no HTTP\r\n\r\n")

    def do_to(self) -> None:
        """Redirect to the rest of the address."""
        self.answer(b"moved", 302, Location=self.path.removeprefix("/to/"))

    def do_loop(self) -> None:
        self.answer(b"", 301, Location="/loop")

    def do_endlessredirect(self) -> None:
        self.answer(b"", 302, Location="/ok")
        while True:
            self.wfile.write(bytes(1000))

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self.server_port}"
        self.stop = threading.Event()

    def handle_error(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/ok/a", b"/ok/a"),
        ("/chunked", b"abcde"),
        ("/to//ok/b", b"/ok/b"),
        ("/to//to//ok/c", b"/ok/c"),
        ("/endlessredirect", b"/ok"),
        ("/ok/a b/\N{LATIN SMALL LETTER E WITH ACUTE}?q=1%20", b"/ok/a%20b/%C3%A9?q=1%20"),
    ],
)
def test_content(server: Server, path: str, content: bytes) -> None:
    assert fetch(server.url + path, LIMITS) == content


def test_the_largest_allowed_size(server: Server) -> None:
    assert fetch(server.url + "/ok/12345", DownloadLimits(max_bytes=9)) == b"/ok/12345"
    with pytest.raises(DownloadError, match="9 bytes, the limit is 8"):
        fetch(server.url + "/ok/12345", DownloadLimits(max_bytes=8))


@pytest.mark.parametrize(
    ("path", "reason", "detail"),
    [
        ("/missing", "download failed", "HTTP status 404"),
        ("/large", "download too large", "1001 bytes, the limit is 1000"),
        ("/endless", "download too large", "more than the limit of 1000 bytes"),
        ("/hang", "download timed out", ""),
        ("/drip", "download timed out", ""),
        ("/dripheaders", "download timed out", ""),
        ("/dripstatus", "download timed out", ""),
        ("/short", "download failed", "891 bytes too early"),
        ("/nonsense", "download failed", ""),
        ("/loop", "download failed", "more than 3 redirects"),
        ("/to/file:///etc/hostname", "not http or https", "file:///etc/hostname"),
        ("/to/ftp://localhost/x", "not http or https", "ftp://localhost/x"),
        ("/to/http://[broken", "download failed", ""),
    ],
)
def test_failures_have_a_reason_and_end_in_time(server: Server, path: str, reason: str, detail: str) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        fetch(server.url + path, LIMITS)
    assert time.monotonic() - start < LIMITS.total_timeout + 0.5
    assert caught.value.reason == reason
    assert server.url + path in str(caught.value) and detail in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://localhost/a.png", "data:image/png;base64,AA", "a.png", ""]
)
def test_only_http_and_https(url: str) -> None:
    with pytest.raises(DownloadError, match="not http or https"):
        fetch(url, LIMITS)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://127.0.0.1:1/"])
def test_addresses_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DownloadError, match="download failed"):
        fetch(url, LIMITS)


def test_many_keep_their_order_whatever_ends_first(server: Server) -> None:
    paths = ["/slow/0", "/ok/1", None, "/missing", "/hang", *(f"/slow/{number}" for number in range(5, 20)), None]
    urls = [path and server.url + path for path in paths]
    results = list(fetch_all(iter(urls), LIMITS))
    assert len(results) == len(paths)
    for path, result in zip(paths, results, strict=True):
        if path is None:
            assert result is None
        elif "slow" in path or "ok" in path:
            assert result == path.encode()
        else:
            assert isinstance(result, DownloadError)


def test_many_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [], []

    def fake(url: str, limits: DownloadLimits) -> bytes:
        running.append(url)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(url)
        return url.encode()

    monkeypatch.setattr(fetch_module, "fetch", fake)
    urls = [f"http://{number}" for number in range(50)]
    assert list(fetch_all(urls, LIMITS)) == [url.encode() for url in urls]
    assert 1 < max(most) <= LIMITS.workers


def test_many_are_read_only_a_few_ahead(server: Server) -> None:
    urls = iter([server.url + "/ok"] * 1000)
    results = fetch_all(urls, LIMITS)
    assert next(results) == b"/ok"
    assert len(list(urls)) >= 1000 - 2 * LIMITS.workers - 1
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


@pytest.mark.parametrize("make", [lambda: DownloadLimits(workers=0), lambda: DownloadLimits(timeout=float("inf"))])
def test_limits_are_checked(make: Callable[[], DownloadLimits]) -> None:
    with pytest.raises(ValueError, match=r"(workers=0|timeout=inf): expected a positive, finite number"):
        make()
