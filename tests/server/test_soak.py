"""Many requests of every kind at once, well-formed, wrong and abandoned: all answered rightly, and nothing is left.

pytest tests/server/test_soak.py --soak-requests=10000
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

import hf_paged
from tests.helpers import demo_model
from tests.server.support import Running, error_of, events, running
from tests.server.test_adapters import save
from tests.server.test_limits import LONG, start

pytestmark = pytest.mark.slow

PROMPTS = ("The list of", "import os", "class Shape:\n    def", "An object that", "x" * 300)
BAD: tuple[dict[str, Any], ...] = (
    {"temperature": 3},
    {"prompt": [5000]},
    {"prompt": []},
    {"n": 10**9},
    {"max_tokens": 10**6},
    {"min_tokens": 99},
    {"stop": [""] * 20},
    {"logit_bias": {"99999": 1}},
    {"logprobs": 1000},
    {"tools": [1]},
    {"structured_outputs": {"regex": "("}},
    {"allowed_token_ids": [-1]},
)
KINDS = ("good", "good", "good", "good", "good", "stream", "seeded", "bad", "gone", "slow", "grammar", "load")
#: Parts of the run; what is open is looked at after each, when nothing runs.
_PARTS = 10
#: Bytes the process may have grown by in the second half of the run.
_GROWTH = 96 * 2**20


class Soak:
    """One of the clients."""

    def __init__(self, server: Running, expected: dict[Any, str], checkpoints: Path) -> None:
        self.server = server
        self.expected = expected
        self.checkpoints = checkpoints
        self.loading = threading.Lock()

    def one(self, number: int) -> None:
        chance = random.Random(number)
        kind = chance.choice(KINDS)
        with self.server.client() as client:
            getattr(self, kind)(client, chance)

    def post(self, client: httpx.Client, **body: Any) -> httpx.Response:
        """An answer; one that was turned away is asked for again, as clients do."""
        for _ in range(600):
            response = client.post("/v1/completions", json=body)
            if response.status_code != 429:
                return response
            time.sleep(0.1)
        raise AssertionError("turned away for a minute")

    def good(self, client: httpx.Client, chance: random.Random) -> None:
        prompt = chance.choice(PROMPTS)
        response = self.post(client, prompt=prompt, max_tokens=24, temperature=0, n=chance.choice([1, 1, 2]))
        assert {c["text"] for c in response.json()["choices"]} == {self.expected[prompt, None]}

    def seeded(self, client: httpx.Client, chance: random.Random) -> None:
        prompt, seed = chance.choice(PROMPTS), chance.randrange(3)
        response = self.post(client, prompt=prompt, max_tokens=24, seed=seed)
        assert response.json()["choices"][0]["text"] == self.expected[prompt, seed]

    def stream(self, client: httpx.Client, chance: random.Random) -> None:
        prompt = chance.choice(PROMPTS)
        response = self.post(client, prompt=prompt, max_tokens=24, temperature=0, stream=True)
        *chunks, done = events(response.text)
        assert done == "[DONE]"
        assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == self.expected[prompt, None]

    def bad(self, client: httpx.Client, chance: random.Random) -> None:
        error_of(self.post(client, **({"prompt": "x"} | chance.choice(BAD))), 400)

    def gone(self, client: httpx.Client, chance: random.Random) -> None:
        body = LONG | {"n": chance.choice([1, 3]), "stream": chance.random() < 0.5, "max_tokens": 200}
        connection = start(self.server, body)
        time.sleep(chance.random() * 0.05)
        connection.close()

    def slow(self, client: httpx.Client, chance: random.Random) -> None:
        connection = start(self.server, LONG | {"stream": True, "max_tokens": 24})
        connection.settimeout(120)
        received = b""
        while b"[DONE]" not in received and b" 429 " not in received[:40]:
            received += connection.recv(512)
            time.sleep(0.002)
        connection.close()

    def grammar(self, client: httpx.Client, chance: random.Random) -> None:
        choices = [f"yes-{chance.randrange(50)}", "no"]
        response = self.post(client, prompt="x", max_tokens=20, structured_outputs={"choice": choices})
        assert response.json()["choices"][0]["text"] in choices

    def load(self, client: httpx.Client, chance: random.Random) -> None:
        if chance.random() < 0.8 or not self.loading.acquire(blocking=False):
            return
        try:
            body = {"lora_name": "mine", "lora_path": chance.choice(["one", "two"]), "load_inplace": True}
            response = client.post("/v1/load_lora_adapter", json=body)
            assert response.is_success, response.text
            response = self.post(client, prompt=PROMPTS[0], max_tokens=24, temperature=0, model="mine")
            assert response.json()["choices"][0]["text"] == self.expected[body["lora_path"], "adapter"]
        finally:
            self.loading.release()


class Resources(NamedTuple):
    """What this process has open."""

    files: int
    threads: int
    tasks: int
    resident_bytes: int


def resources() -> Resources:
    gc.collect()
    # By type(): isinstance would ask lazy things of other libraries for their class.
    tasks = sum(issubclass(type(thing), asyncio.Task) and not thing.done() for thing in gc.get_objects())
    resident = psutil.Process().memory_info().rss
    return Resources(len(os.listdir("/proc/self/fd")), threading.active_count(), tasks, resident)


def settled(at_most: Resources | None) -> Resources:
    """The resources once connections, tasks and threads that are ending have ended."""
    deadline = time.monotonic() + 15
    while True:
        now = resources()
        ended = at_most is None or all(n <= m for n, m in zip(now[:3], at_most[:3], strict=True))
        if ended or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


@pytest.mark.timeout(7200)
def test_soak(tokenizer: Any, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    total = pytestconfig.getoption("--soak-requests")
    if not total:
        pytest.skip("give --soak-requests")
    save(tmp_path / "one", 1)
    save(tmp_path / "two", 2)
    model = demo_model("llama")
    with running(model, tokenizer, model_names=("base",), adapter_root=tmp_path, max_sequences=48) as server:
        with server.client() as client:

            def text(**body: Any) -> str:
                response = client.post("/v1/completions", json={"max_tokens": 24} | body)
                return response.json()["choices"][0]["text"]

            expected: dict[Any, str] = {(p, None): text(prompt=p, temperature=0) for p in PROMPTS}
            expected |= {(p, seed): text(prompt=p, seed=seed) for p in PROMPTS for seed in range(3)}
            for name in ("one", "two"):
                body = {"lora_name": "mine", "lora_path": name, "load_inplace": True}
                assert client.post("/v1/load_lora_adapter", json=body).is_success
                expected[name, "adapter"] = text(prompt=PROMPTS[0], temperature=0, model="mine")
            assert text(prompt="x", structured_outputs={"choice": ["a"]}) == "a"
        soak = Soak(server, expected, tmp_path)
        curve: list[Resources] = []
        for part in range(_PARTS):
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(soak.one, range(part * total // _PARTS, (part + 1) * total // _PARTS)))
            server.wait_until_empty(30)
            curve.append(settled(curve[_PARTS // 2 - 1] if part >= _PARTS // 2 else None))
            print(f"{(part + 1) * total // _PARTS} requests: {curve[-1]}", flush=True)
        before, after = curve[_PARTS // 2 - 1], curve[-1]
        for name in ("files", "threads", "tasks"):
            assert getattr(after, name) <= getattr(before, name) + 2, name
        grown = after.resident_bytes - before.resident_bytes
        assert grown <= _GROWTH, f"{grown / 2**20:.0f} MiB more"
        with server.client() as client:
            assert client.get("/health").status_code == 200
    assert hf_paged.stats(model).fallback_calls == {}
    hf_paged.disable(model)
