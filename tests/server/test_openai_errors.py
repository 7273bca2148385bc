"""Each way a request can fail, as OpenAI's own client raises it; and what its retries and closed streams come to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

import hf_paged
from tests.helpers import demo_model
from tests.server.support import Running, running
from tests.server.test_lifecycle import free_port
from tests.server.test_limits import wait_for

LONG: Any = {"model": "demo", "prompt": "The list of", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
CHAT: Any = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def own(tokenizer: Any) -> Iterator[Running]:
    """A server whose engine may break, which gives a request 0.3 s and a body 4 kB."""
    model = demo_model("llama")
    limits: dict[str, Any] = {"request_timeout": 0.3, "max_body_bytes": 4096}
    with running(model, tokenizer, model_names=("demo",), **limits) as server:
        yield server
    hf_paged.disable(model)


def client_of(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "unused", "max_retries": 0} | options)


def test_bad_requests_name_their_field_on_both_routes(server: Running) -> None:
    with client_of(server) as api:
        for name, value in (("temperature", 9), ("n", 10**6), ("stop", [""]), ("logit_bias", {"-1": 1})):
            for create, asked in (
                (api.chat.completions.create, CHAT),
                (api.completions.create, {"model": "demo", "prompt": "x"}),
            ):
                with pytest.raises(openai.BadRequestError) as refused:
                    create(**asked, **{name: value})
                assert refused.value.param is not None
                assert refused.value.param.startswith(name)
                assert refused.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="no_such_field"):
            api.chat.completions.create(**CHAT, extra_body={"no_such_field": 1})
        with pytest.raises(openai.NotFoundError) as unknown:
            api.models.retrieve("other")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="no such route"):
            api.embeddings.create(model="demo", input="x")


def test_a_body_that_is_too_large(own: Running) -> None:
    with client_of(own) as api, pytest.raises(openai.APIStatusError) as refused:
        api.completions.create(model="demo", prompt="x" * 5000)
    assert refused.value.status_code == 413


def test_a_request_that_takes_too_long_is_a_server_error_whole_and_streamed(own: Running) -> None:
    with client_of(own) as api:
        with pytest.raises(openai.InternalServerError) as late:
            api.completions.create(**LONG)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="did not end within"):
            list(api.completions.create(**LONG, stream=True))
        own.wait_until_empty()


def test_a_failed_forward_is_a_server_error_whole_and_streamed(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(type(own.state.served.inner.model.layers[0].mlp), "forward", broken)
    with client_of(own) as api:
        with pytest.raises(openai.InternalServerError) as failed:
            api.chat.completions.create(**CHAT)
        assert (failed.value.status_code, failed.value.type) == (500, "server_error")
        assert "inside" not in str(failed.value)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(api.chat.completions.create(**CHAT, stream=True))
        monkeypatch.undo()
        assert api.chat.completions.create(**CHAT, max_tokens=1).choices


def test_an_engine_that_is_gone_is_a_server_error_with_a_time_to_retry(own: Running) -> None:
    hf_paged.disable(own.state.served.inner)
    with client_of(own) as api, pytest.raises(openai.InternalServerError) as gone:
        api.completions.create(model="demo", prompt="x")
    assert (gone.value.status_code, gone.value.code) == (503, "engine_unavailable")
    assert gone.value.response.headers["retry-after"] == "1"


def test_nobody_listening_is_a_connection_error() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as api,
        pytest.raises(openai.APIConnectionError),
    ):
        api.models.list()


def test_the_client_itself_asks_again_after_it_was_turned_away(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, model_names=("demo",), max_sequences=1) as server:
        ticket = server.state.runs.admission.enter(1, 1)
        check = server.state.runs.admission.check

        def let_in_the_second(*args: Any) -> None:
            try:
                check(*args)
            finally:
                ticket.release()

        server.state.runs.admission.check = let_in_the_second  # type: ignore[method-assign]
        with client_of(server, max_retries=1) as api:
            assert api.completions.create(model="demo", prompt="x", max_tokens=1).choices
        assert server.state.runs.admission.refused == 1
        server.wait_until_empty()


def test_a_stream_that_is_closed_by_the_client_leaves_nothing(server: Running) -> None:
    with client_of(server) as api:
        stream = api.completions.create(**LONG, stream=True)
        assert next(iter(stream)).choices
        stream.close()
        wait_for(lambda: server.state.served.engine.stats().running == 0)
    server.wait_until_empty()
