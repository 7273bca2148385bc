"""Replicas on Ray Serve and batches on Ray Data. Needs the extra `ray`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hf_paged.errors import ConfigError
from tests.helpers import DEMO_MODELS, demo_model, demo_tokenizer
from tests.server.test_lifecycle import free_port
from tests.server.test_limits import LONG

pytestmark = [pytest.mark.slow, pytest.mark.clients]

ray = pytest.importorskip("ray")
MODEL = str(DEMO_MODELS / "llama")


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """A local Ray of two (nominal) processors; the port of its proxy."""
    from ray import serve

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


class Stream:
    """One streamed request: where it runs, what came of it."""

    def __init__(self, url: str) -> None:
        self.url, self.replica, self.text, self.whole = url, "", "", False

    def run(self) -> Stream:
        body = LONG | {"stream": True, "max_tokens": 500}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
                self.replica = response.headers.get("x-served-by", "")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.whole = True
                    elif line.startswith("data: "):
                        self.text += json.loads(line[6:])["choices"][0]["text"]
        except (httpx.HTTPError, KeyError):
            self.whole = False
        return self


def test_two_replicas_answer_and_one_that_is_killed_takes_only_its_own(cluster: int) -> None:
    from ray import serve

    from hf_paged.server import ray_app

    began = time.monotonic()
    url = f"http://127.0.0.1:{cluster}"
    serve.run(ray_app(MODEL, model_names=("demo",), replicas=2), name="demo", route_prefix="/")
    (expected,) = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 500}, timeout=60).json()[
        "choices"
    ]
    streams = [Stream(url) for _ in range(16)]
    with ThreadPoolExecutor(16) as threads:
        running = [threads.submit(stream.run) for stream in streams]
        while not all(stream.text for stream in streams):  # all have begun
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        by_replica: dict[str, list[Stream]] = defaultdict(list)
        for stream in streams:
            by_replica[stream.replica].append(stream)
        assert len(by_replica) == 2, by_replica.keys()
        killed, kept = by_replica
        ray.kill(ray.get_actor(killed, namespace="serve"))
        for done in running:
            done.result(60)
    assert all(stream.whole and stream.text == expected["text"] for stream in by_replica[kept])
    lost = by_replica[killed]
    assert not all(stream.whole for stream in lost), "it was killed too late to show anything"
    assert all(expected["text"].startswith(stream.text) for stream in lost)
    # The router knows by now or soon: who asks again is answered.
    for _ in range(8):
        answer = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 500}, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected["text"]
    assert time.monotonic() - began < 60
    serve.delete("demo")


def test_batches_on_ray_data(cluster: int, tmp_path: Path) -> None:
    from hf_paged.server.ray_data import main

    prompts = ["The list of", "import os", "class Shape", "An object that"] * 3
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(prompts)))
    main(MODEL, source, tmp_path / "out", max_new_tokens=12, batch_size=6)
    rows: list[dict[str, Any]] = [
        json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()
    ]
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    assert sorted(row["id"] for row in rows) == list(range(12))
    for row in rows:
        inputs = tokenizer(prompts[row["id"]], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert row["text"] == tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def test_what_cannot_be_is_named() -> None:
    from hf_paged.server.ray_serve import build, ray_app

    for replicas in (0, -1, True, (3, 2), (-1, 2), (1, 2, 3), (0, 0)):
        with pytest.raises(ConfigError, match="replicas"):
            ray_app(MODEL, replicas=replicas)
    with pytest.raises(ConfigError, match="autoscaling"):
        ray_app(MODEL, replicas=2, autoscaling={"target_ongoing_requests": 5})
    for args, told in (
        ({}, "model"),
        ({"model": "x", "foo": "1"}, "foo"),
        ({"model": "x", "num_gpus": "a"}, "num_gpus"),
    ):
        with pytest.raises(ConfigError, match=told):
            build(args)
    scaled = ray_app(MODEL, replicas=(1, 3), autoscaling={"target_ongoing_requests": 5})
    config = scaled._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 3, 5)
