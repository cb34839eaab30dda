"""JSON requests to a server that may do anything: one deadline, a bounded reply, no redirects.

The deadline holds for a whole request (connection, headers, body), however slowly bytes drip in.
Replies are bounded before and after decompression; headers are bounded by the HTTP library. Hosts
of this machine are never asked through a proxy.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from una_fast.rewards.outcome import basic_secret

LARGEST_REPLY = 8 * 2**20  # bytes of a body, decompressed, where the caller sets no other bound

UNCHANGED = "!$%&'()*+,/:;=?@[]~"  # characters of a path or a query beside letters and digits


class NoReplyError(Exception):
    """A request without a usable reply.

    reason: a short text, by which failures are counted
    passes: the server may answer later
    """

    def __init__(self, reason: str, detail: str = "", *, passes: bool = False) -> None:
        self.reason = reason
        self.detail = detail
        self.passes = passes
        super().__init__(f"{reason}: {detail}")


class Reply(NamedTuple):
    """A reply of any status."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Requests to a URL, or to paths below the URL; threads may share a client."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        *,
        timeout: float,
        connections: int,
        largest: int = LARGEST_REPLY,
    ) -> None:
        """Prepare requests; ValueError for an unusable proxy or unreadable certificates.

        url: http or https; its user and password are sent as basic authorization
        headers: of every request
        timeout: seconds for a whole request
        connections: kept open between requests
        largest: bytes of a reply, decompressed
        """
        self.largest = largest
        self.core = _http_library()
        self.timeout = timeout
        self.clock = threading.local()
        parts = urlsplit(url)
        host = parts.hostname.encode("ascii" if parts.hostname.isascii() else "idna")
        target = quote(parts.path or "/", safe=UNCHANGED)
        if parts.query:
            target += "?" + quote(parts.query, safe=UNCHANGED)
        self.url = self.core.URL(
            scheme=parts.scheme.encode(), host=host, port=parts.port, target=target.encode()
        )
        # Compressed replies are read, but not asked for.
        given = {"Host": _host_header(parts, host), "Accept-Encoding": "identity"}
        if parts.username or parts.password:
            names = (unquote(parts.username or ""), unquote(parts.password or ""))
            given["Authorization"] = f"Basic {basic_secret(*names)}"
        self.headers = {"User-Agent": "una-fast", **given, **headers}
        self.pool = self.core.ConnectionPool(
            ssl_context=_certificates() if parts.scheme == "https" else None,
            proxy=self._proxy(parts),
            max_connections=None,  # the threads bound the requests
            max_keepalive_connections=connections,
            keepalive_expiry=5.0,
            network_backend=_TimedBackend(self),
        )

    def post(self, body: bytes) -> Reply:
        """Return the reply to a body; NoReplyError if none came in time, or none that is usable."""
        return self.send("POST", body=body)

    def send(self, method: str, path: str = "", body: bytes | None = None) -> Reply:
        """Return the reply to a request; NoReplyError as `post`.

        method: GET or POST
        path: below the URL, such as /v1/models; "": the URL itself
        body: of the request
        """
        self.clock.end = time.monotonic() + self.timeout
        headers = list(self.headers.items())
        url = self._below(path) if path else self.url
        try:
            with self.pool.stream(method, url, headers=headers, content=body) as response:
                found = {}
                for name, value in response.headers:
                    found[name.decode("latin-1").lower()] = value.decode("latin-1")
                return Reply(response.status, found, _read(response, found, self.largest))
        except self.core.TimeoutException:
            raise NoReplyError("timeout", f"after {self.timeout:g} s", passes=True) from None
        except (
            self.core.NetworkError,
            self.core.ProtocolError,
            self.core.ProxyError,
            OSError,
        ) as error:
            detail = f"{type(error).__name__}: {error}"
            raise NoReplyError("no connection", detail, passes=True) from None

    def _below(self, path: str) -> Any:
        """Return the URL of a path below the client's URL."""
        url = self.url
        target = url.target.rstrip(b"/") + path.encode("ascii")
        return self.core.URL(scheme=url.scheme, host=url.host, port=url.port, target=target)

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()

    def seconds_left(self) -> float:
        """Return the seconds that this thread's request has left; TimeoutException if none."""
        left = self.clock.end - time.monotonic()
        if left <= 0:
            raise self.core.ReadTimeout("deadline")
        return left

    def _proxy(self, parts: SplitResult) -> Any:
        """Return the proxy that the environment names for a URL, or None."""
        if is_loopback(parts.hostname) or urllib.request.proxy_bypass(parts.hostname):
            return None
        proxies = urllib.request.getproxies()
        name = parts.scheme if parts.scheme in proxies else "all"
        found = proxies.get(name)
        if not found:
            return None
        proxy = urlsplit(found if "://" in found else f"http://{found}")
        try:
            usable = proxy.scheme in ("http", "https") and bool(proxy.hostname)
            address = f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"
            usable = usable and proxy.port != 0 and address.isascii()
        except ValueError:  # a port that is no number
            usable = False
        if not usable:
            # Not shown: it may hold a password.
            raise ValueError(
                f"the environment variable {name.upper()}_PROXY must be a URL such as "
                "http://proxy:3128"
            )
        auth = None
        if proxy.username is not None:
            auth = (unquote(proxy.username), unquote(proxy.password or ""))
        return self.core.Proxy(address, auth=auth)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is of this machine itself."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address: Any = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, 2130706433
        except (OSError, ValueError):
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _http_library() -> ModuleType:
    """Import the HTTP library below huggingface-hub: httpcore2 since version 2.0 of it."""
    try:
        return importlib.import_module("httpcore2")
    except ModuleNotFoundError:
        return importlib.import_module("httpcore")


def _host_header(parts: SplitResult, host: bytes) -> str:
    name = host.decode("ascii")
    name = f"[{name}]" if ":" in name else name
    return name if parts.port is None else f"{name}:{parts.port}"


def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates; ValueError by the name of the variable that is wrong."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and not folder:
        file = importlib.import_module("certifi").where()
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except OSError as error:
        raise ValueError(
            f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error.strerror}"
        ) from None


def _read(response: Any, headers: dict[str, str], largest: int) -> bytes:
    """Return the body of a response, decompressed; at most `largest` bytes."""
    encoding = headers.get("content-encoding", "").strip().lower()
    packed = zlib.decompressobj(47) if encoding in ("gzip", "x-gzip", "deflate") else None
    if packed is None and encoding not in ("", "identity"):
        raise NoReplyError("wrong JSON", f"a reply compressed by {encoding}")
    received, size = 0, 0
    parts = []
    for part in response.iter_stream():
        received += len(part)
        if packed is not None:
            try:
                part = packed.decompress(part, largest + 1 - size)
            except zlib.error as error:
                raise NoReplyError("wrong JSON", f"a damaged {encoding} reply: {error}") from None
        size += len(part)
        if max(received, size) > largest:
            raise NoReplyError("reply too large", f"more than {largest} bytes")
        parts.append(part)
    return b"".join(parts)


class _TimedBackend:
    """Connections whose operations take no longer than the client's request may."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.backend = client.core.SyncBackend()

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> Any:
        left = self.client.seconds_left()
        return _TimedStream(self.client, self.backend.connect_tcp(host, port, left, **more))

    def sleep(self, seconds: float) -> None:
        self.backend.sleep(seconds)


class _TimedStream:
    """A stream of `_TimedBackend`; the timeouts of the HTTP library are for single operations."""

    def __init__(self, client: Client, stream: Any) -> None:
        self.client = client
        self.stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.client.seconds_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, self.client.seconds_left())

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> _TimedStream:
        left = self.client.seconds_left()
        return _TimedStream(self.client, self.stream.start_tls(ssl_context, server_hostname, left))

    def close(self) -> None:
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)
