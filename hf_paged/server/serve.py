"""Running the app: a uvicorn server that ends when it is told to, after what runs has ended."""

from __future__ import annotations

import gc
import signal
from types import FrameType
from typing import Any

import uvicorn

from hf_paged.server.config import ServerConfig

#: Bytes of the request line and headers; h11 refuses more. The faster parser of uvicorn bounds nothing, and loses the
#: body of a request that offers to go on in HTTP/2.
MAX_HEADER_BYTES = 65536
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains: no new connections, running requests may end. A second one ends them."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def make_server(
    app: Any,
    config: ServerConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    max_connections: int = 4096,
) -> Server:
    """A server for `app`, to be run.

    Args:
        host: where to listen; loopback only by default.
        port: 0 for a free one.
        max_connections: more are answered with 503 at once.
    """
    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level=log_level,
            access_log=False,
            server_header=False,
            http="h11",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
        )
    )


def run(server: Server) -> None:
    """Runs `server` in the main thread until it is told to end; returns then."""
    # What is there now stays: a collection that looks through all of torch and the model's modules again halts every
    # stream for a fifth of a second.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signals it was ended by once more when all is done: the process shall end in its own way.
    before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.unfreeze()


def _ignore(sig: int, frame: FrameType | None) -> None:
    pass
