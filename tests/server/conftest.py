"""One server for most tests: a demo model that was trained, so that texts end and differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import hf_paged
from tests.helpers import demo_model, demo_tokenizer
from tests.server.support import Running, running


@pytest.fixture(scope="session")
def llama() -> Iterator[Any]:
    """The demo LLaMA, enabled."""
    model = demo_model("llama")
    hf_paged.enable(model)
    yield model
    hf_paged.disable(model)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return demo_tokenizer("llama")


@pytest.fixture(scope="session")
def server(llama: Any, tokenizer: Any) -> Iterator[Running]:
    with running(llama, tokenizer, model_names=("demo", "also-demo")) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
    server.wait_until_empty()
