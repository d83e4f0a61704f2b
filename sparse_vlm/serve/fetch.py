"""An image's bytes from its URL: a data URI, or http(s) from the domains that the operator allows.

Notable: a server that fetches what strangers name must not reach its own network. Names are resolved first, every address must be public,
the connection goes to the very address that was checked, and a redirect is a new URL that is checked like the first.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from sparse_vlm.errors import printable
from sparse_vlm.serve.protocol import ApiError

REDIRECTS = 3
SECONDS = 10.0  # for all of a fetch
_NOT_A_URL = re.compile(r"[^\x21-\x7e]|\\")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def read_url(url: str, name: str, domains: Collection[str], max_bytes: int) -> bytes:
    """The bytes behind an image's URL.

    Args:
        name: place in the request, for errors.
        domains: hosts that may be fetched from, in lower case.
        max_bytes: of an image.

    Raises:
        ApiError: not a data URI of an image, a host that is not allowed or not public, or a fetch that failed.
    """
    if url[:5].lower() == "data:":
        return _from_data(url, name)
    if url[:7].lower() == "http://" or url[:8].lower() == "https://":
        if not domains:
            raise ApiError(400, f"{name}: this server fetches no URLs; send the image as data:image/jpeg;base64,...", param=name)
        return _fetch(url, name, domains, max_bytes)
    raise ApiError(400, f"{name}: expected a URL that begins with data:image/", param=name)


def _from_data(url: str, name: str) -> bytes:
    head, comma, data = url[5:].partition(",")
    kind, *parameters = (part.strip().lower() for part in head[:200].split(";"))
    if not comma or "base64" not in parameters:
        raise ApiError(400, f"{name}: expected data:image/jpeg;base64,...", param=name)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise ApiError(400, f"{name}: is {printable(kind)[:60]}, not an image", param=name)
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise ApiError(400, f"{name}: not base64 ({error})", param=name) from None
    if not decoded:
        raise ApiError(400, f"{name}: is empty", param=name)
    return decoded


def _fetch(url: str, name: str, domains: Collection[str], max_bytes: int) -> bytes:
    end = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        parts = _checked(url, name, domains)
        try:
            found = _get(parts, name, max_bytes, end)
        except ApiError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a socket that the timer closed
            late = time.monotonic() >= end
            why = f"took more than {SECONDS:g} seconds" if late else getattr(error, "strerror", None) or type(error).__name__
            raise ApiError(400, f"{name}: {parts.hostname} cannot be fetched from ({why})", param=name) from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise ApiError(400, f"{name}: more than {REDIRECTS} redirects", param=name)


def _checked(url: str, name: str, domains: Collection[str]) -> SplitResult:
    """A URL's parts, of an allowed host, on the usual port, without a password."""
    try:
        if len(url) > 4096 or _NOT_A_URL.search(url):
            raise ValueError
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ApiError(400, f"{name}: not a URL", param=name) from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None or port not in (None, 80, 443):
        raise ApiError(400, f"{name}: only plain http and https URLs on the usual ports are fetched", param=name)
    if host not in domains:
        raise ApiError(400, f"{name}: {host} is not among the domains that this server fetches from", param=name)
    return parts


def _get(parts: SplitResult, name: str, max_bytes: int, end: float) -> bytes | str:
    """The body, or where a redirect leads."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _public_address(host, port, name)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.001)))
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))
        # a server that sends a byte a second passes every timeout of a single read
        timer = threading.Timer(max(end - time.monotonic(), 0), _shut, [sock])
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": host, "User-Agent": "sparse-vlm", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (location := response.headers.get("Location")):
            return location
        if response.status != 200:
            raise ApiError(400, f"{name}: {host} answered {response.status}", param=name)
        data = response.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ApiError(413, f"{name}: more than {max_bytes:,} bytes", param=name)
        if response.length:  # cut off
            raise ApiError(400, f"{name}: {host} sent less than it announced", param=name)
        return data


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _public_address(host: str, port: int, name: str) -> str:
    """An address of a host, all of whose addresses are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(map(is_public, found)):
        raise ApiError(400, f"{name}: {host} has an address that is not public", param=name)
    return found[0]


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, whatever is embedded in it: not private, loopback, link-local or multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if ip.teredo is not None:
            return False
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
