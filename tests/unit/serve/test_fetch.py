"""Images by URL: what a server fetches, and what it must not reach."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from sparse_vlm.serve import fetch
from sparse_vlm.serve.protocol import ApiError


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool):
    assert fetch.is_public(address) is public


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """`photos.example`, a host whose answers a test fills in by path; its name leads to a server of this machine."""
    answers: dict[str, bytes] = {}
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client:
                path = client.recv(4096).split()[1].decode()
                client.sendall(answers[path])

    def resolve(host: str, port: int, **more: Any) -> list[Any]:
        return [(0, 0, 0, "", ("93.184.216.34" if host == "photos.example" else "10.0.0.7", port))]

    def reach(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address == ("93.184.216.34", 80), "the address that was checked"
        sock = socket.socket()
        sock.settimeout(timeout)
        sock.connect(listening.getsockname())
        return sock

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch.socket, "create_connection", reach)
    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield answers
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(10)


def get(url: str) -> bytes:
    return fetch.read_url(url, "image 1", {"photos.example", "inside.example"}, 1000)


def test_allowed_url(site: dict[str, bytes]):
    site["/a"] = b"HTTP/1.1 302 Found\r\nLocation: /b?c=1\r\nContent-Length: 0\r\n\r\n"
    site["/b?c=1"] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbytes"
    assert get("http://photos.example/a") == b"bytes"


@pytest.mark.parametrize(
    ("url", "reply", "status", "named"),
    [
        ("http://inside.example/a", b"", 400, "not public"),
        ("http://other.example/a", b"", 400, "other.example"),
        ("http://photos.example.other.example/a", b"", 400, "not among"),
        ("http://user@photos.example/a", b"", 400, "plain http"),
        ("http://photos.example:22/a", b"", 400, "usual ports"),
        ("http://photos.example:x/a", b"", 400, "not a URL"),
        ("http://photos.example/a b", b"", 400, "not a URL"),
        ("http://other.example\\@photos.example/", b"", 400, "not a URL"),
        ("http://photos.example/a", b"HTTP/1.1 302 Found\r\nLocation: http://inside.example/\r\n\r\n", 400, "not public"),
        ("http://photos.example/a", b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", 400, "plain http"),
        ("http://photos.example/a", b"HTTP/1.1 302 Found\r\nLocation: /a\r\n\r\n", 400, "redirects"),
        ("http://photos.example/a", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", 400, "404"),
        ("http://photos.example/a", b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001, 413, "1,000 bytes"),
        ("http://photos.example/a", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", 400, "cannot be fetched|announced"),
        ("http://photos.example/a", b"nonsense\r\n\r\n", 400, "cannot be fetched"),
    ],
)
def test_refused_urls(site: dict[str, bytes], url: str, reply: bytes, status: int, named: str):
    site["/a"] = reply
    with pytest.raises(ApiError, match=named) as caught:
        get(url)
    assert caught.value.status == status


def test_slow_site_is_given_up(site: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "SECONDS", 0.5)
    site["/a"] = b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nx"
    began = time.monotonic()
    with pytest.raises(ApiError, match="photos.example"):
        get("http://photos.example/a")
    assert time.monotonic() - began < 5
