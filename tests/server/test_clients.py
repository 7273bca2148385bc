"""Clients that people have, and one that tries whatever the schema allows. Needs the extra `clients`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.server.support import Running, running

pytestmark = pytest.mark.clients

schemathesis = pytest.importorskip("schemathesis")
langchain_openai = pytest.importorskip("langchain_openai")


@pytest.fixture(scope="module")
def bounded(llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lets nobody ask for much, with every route there is."""
    limits: dict[str, Any] = {"max_model_len": 64, "max_choices": 4, "grammar_timeout": 2.0}
    root = tmp_path_factory.mktemp("adapters")
    with running(llama, tokenizer, model_names=("demo",), adapter_root=root, **limits) as server:
        yield server
        server.wait_until_empty()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_nothing_that_the_schema_allows_or_forbids_is_a_server_error(bounded: Running, mode: str) -> None:
    # Not by schemathesis' own pytest plugin, which does not know pytest 9.2.
    schema = schemathesis.openapi.from_dict(bounded.app.openapi())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 11
    statuses: set[int] = set()
    for operation in operations:
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=cases)
        def try_it(case: Any) -> None:
            response = case.call(base_url=bounded.url)
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            try_it()
        except Unsatisfiable:
            assert mode == "negative"  # a route without a parameter has nothing to get wrong
    assert {200, 400} <= statuses if mode == "positive" else {400} <= statuses


def test_langchain(server: Running) -> None:
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "unused", "model": "demo"}
    chat = langchain_openai.ChatOpenAI(**options, temperature=0, max_tokens=12, max_retries=0)
    whole = chat.invoke("What is a list?")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in chat.stream("What is a list?")) == whole.content
    assert [answer.content for answer in chat.batch(["What is a list?"] * 4)] == [whole.content] * 4
    text = langchain_openai.OpenAI(**options, temperature=0, max_tokens=12, max_retries=0)
    assert text.invoke("The list of")
    assert "".join(text.stream("The list of")) == text.invoke("The list of")
    server.wait_until_empty()
