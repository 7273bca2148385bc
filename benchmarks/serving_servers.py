"""The two servers as processes: ours, and transformers' with continuous batching."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_READY_WITHIN = 180.0
#: `transformers` as a command, of the interpreter that runs this.
_TRANSFORMERS = (
    "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
)


@dataclass(frozen=True)
class Settings:
    """How a server is started.

    Attributes:
        options: of its command line.
        threads: OMP_NUM_THREADS; None leaves it to torch.
    """

    options: Mapping[str, str]
    threads: int | None = None

    def describe(self) -> dict[str, Any]:
        return {"options": dict(self.options), "OMP_NUM_THREADS": self.threads}


def command_of(server: str, model: Path, port: int, settings: Settings) -> list[str]:
    """The command line of `server`, "transformers" or "hf_paged"."""
    own = [word for name, value in settings.options.items() for word in (f"--{name}", value)]
    common = [str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *own]
    if server == "hf_paged":
        return [sys.executable, "-m", "hf_paged", "serve", *common, "--log-level", "warning"]
    options = ["--continuous-batching", "--log-level", "error"]
    return [sys.executable, "-c", _TRANSFORMERS, "serve", *common, *options]


class Server:
    """A running server.

    Attributes:
        url: where it answers.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = process
        self._watched = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """Processor time it has used, of all its threads."""
        times = self._watched.cpu_times()
        return times.user + times.system

    def resident_bytes(self) -> int:
        return self._watched.memory_info().rss

    def wait_until_ready(self, bodies: list[dict[str, Any]]) -> None:
        """Returns once it is up and has answered `bodies`, all at once: what is done once has been done.

        Raises:
            RuntimeError: it ended, or is not up in time.
        """
        deadline = time.monotonic() + _READY_WITHIN
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise RuntimeError("the server was not up in time") from None
                time.sleep(0.1)
        self._ask(bodies[0])  # transformers makes its pool now
        with ThreadPoolExecutor(len(bodies)) as threads:
            list(threads.map(self._ask, bodies))

    def _ask(self, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()


@contextlib.contextmanager
def serving(
    server: str, model: Path, settings: Settings, warm_up: list[dict[str, Any]], log: Path
) -> Iterator[Server]:
    """`server`, up and warm; it has ended when the block is left."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    port = _free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command_of(server, model, port, settings), stdout=output, stderr=output, env=environment
        )
    try:
        running = Server(process, port)
        running.wait_until_ready(warm_up)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
