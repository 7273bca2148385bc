"""POST /v1/completions and POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.server.answers import ChatForm, CompletionForm
from hf_paged.server.body import openapi_body, read_body
from hf_paged.server.errors import Route, bad_request
from hf_paged.server.generate import answer
from hf_paged.server.protocol import ChatRequest, CompletionRequest
from hf_paged.server.served_model import ServedModel
from hf_paged.server.state import ServerState

#: OpenAI's, for completions without max_tokens.
_DEFAULT_MAX_TOKENS = 16
#: Characters, or token ids, that are tokenised in less time than it takes to hand them to a thread; and what a prompt
#: costs beside its own.
_AT_ONCE, _EACH = 2304, 256


def router(state: ServerState) -> APIRouter:
    """The routes that generate."""
    routes = APIRouter(route_class=Route)
    served, runs = state.served, state.runs

    @routes.post("/v1/completions", openapi_extra=openapi_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Texts that go on from prompts."""
        body = await read_body(request, CompletionRequest, state.config.body_timeout)
        name = served.names[0] if body.model is None else body.model
        served.adapter_of(name)
        copies = body.n or 1
        if body.best_of is not None and body.best_of < copies:
            raise bad_request(f"best_of: {body.best_of} is less than n, {copies}", "best_of")
        if body.echo and body.logprobs is not None:
            raise bad_request("echo: not with logprobs: those of the prompt are not computed", "echo")
        texts = _prompts(body)
        tried = max(copies, body.best_of or 1)
        # Before prompts are tokenised and copied.
        if len(texts) * tried > state.config.max_choices:
            raise bad_request(
                f"{len(texts)} prompts × {tried} choices: at most {state.config.max_choices} sequences a request",
                "best_of" if tried > copies else "n" if copies > 1 else "prompt",
            )
        runs.admission.check()
        if sum(map(len, texts)) + len(texts) * _EACH <= _AT_ONCE:
            prompts = _encode(served, body, texts)
        else:
            prompts = await runs.in_thread(_encode, served, body, texts)
        echoes = [_echo(served, body, text) for text in texts for _ in range(copies)]
        form = CompletionForm(name, state.vocabulary, logprobs=body.logprobs is not None, echoes=echoes)
        return await answer(
            request,
            state,
            body,
            prompts,
            form,
            copies=copies,
            best_of=body.best_of,
            max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
        )

    @routes.post("/v1/chat/completions", openapi_extra=openapi_body(ChatRequest))
    async def chat(request: Request) -> Response:
        """The next message of a conversation."""
        body = await read_body(request, ChatRequest, state.config.body_timeout)
        name = served.names[0] if body.model is None else body.model
        served.adapter_of(name)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs: only with logprobs=true", "top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise bad_request("max_completion_tokens: not together with max_tokens", "max_completion_tokens")
        for field in ("chat_template", "chat_template_kwargs"):
            if getattr(body, field) is not None:
                raise bad_request(f"{field}: not allowed on this server", field)
        runs.admission.check()
        prompt = await runs.in_thread(_encode_chat, served, body)
        return await answer(
            request,
            state,
            body,
            [prompt],
            ChatForm(name, state.vocabulary, logprobs=bool(body.logprobs)),
            copies=body.n or 1,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    return routes


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one, as texts or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(served: ServedModel, body: CompletionRequest, texts: list[str | list[int]]) -> list[list[int]]:
    special = body.add_special_tokens is not False
    cut = body.truncate_prompt_tokens
    return [
        served.encode(text, add_special_tokens=special, truncate=cut)
        if isinstance(text, str)
        else served.checked(text, cut)
        for text in texts
    ]


def _encode_chat(served: ServedModel, body: ChatRequest) -> list[int]:
    going_on = bool(body.continue_final_message)
    adding = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    if going_on and adding:
        raise bad_request(
            "continue_final_message: not together with add_generation_prompt", "continue_final_message"
        )
    text = served.render(body.messages, add_generation_prompt=adding, continue_final_message=going_on)
    # The template has put the special tokens where they belong.
    return served.encode(
        text, add_special_tokens=bool(body.add_special_tokens), truncate=body.truncate_prompt_tokens
    )


def _echo(served: ServedModel, body: CompletionRequest, text: str | list[int]) -> str:
    if not body.echo:
        return ""
    return text if isinstance(text, str) else served.tokenizer.decode(text, skip_special_tokens=True)
