"""Runs the application on uvicorn until a signal ends it."""

from __future__ import annotations

import copy
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from sparse_vlm.errors import UserError
from sparse_vlm.serve.app import LOOPBACK, create_app
from sparse_vlm.serve.engine import Engine

REST_SECONDS = 5  # after the grace period, for answers to be sent


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet.

    Raises:
        UserError: the address is in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"{host}:{port}: cannot listen here ({getattr(error, 'strerror', None) or error}); see --host and --port") from None
    sock.set_inheritable(True)
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a browser finds the server of a socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(sock: socket.socket) -> bool:
    """Whether a socket is reachable from this machine only."""
    host = sock.getsockname()[0]
    return host == "::1" or host.startswith("127.")


class Server(uvicorn.Server):
    """Ends at SIGINT or SIGTERM: waiting requests are refused, a running answer has its grace period and ends with its last chunk."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._on_start = engine, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at once when asked twice."""
        self._engine.stop()
        super().handle_exit(sig, frame)


def make_server(engine: Engine, sock: socket.socket, api_key: str | None, on_start: Callable[[], None] = lambda: None) -> Server:
    """A server for a bound socket; `run(sockets=[sock])` serves."""
    logging = copy.deepcopy(LOGGING_CONFIG)
    for handler in logging["handlers"].values():
        handler["stream"] = "ext://sys.stderr"
    logging["loggers"]["uvicorn.error"]["level"] = "WARNING"  # `on_start` says that it has started
    hosts = None
    if api_key is None and is_loopback(sock):
        hosts = LOOPBACK | {sock.getsockname()[0]}
    grace = int(engine.limits.grace_seconds) + REST_SECONDS
    config = uvicorn.Config(
        create_app(engine, api_key, hosts), log_config=logging, server_header=False, timeout_graceful_shutdown=grace, ws="none"
    )
    return Server(config, engine, on_start)


def serve(engine: Engine, sock: socket.socket, api_key: str | None, on_start: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, and return."""
    server = make_server(engine, sock, api_key, on_start)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}  # uvicorn raises them again
    try:
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
