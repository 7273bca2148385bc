"""The bodies of requests, field by field. A field that is not here is a 400 that names it, never ignored.

Types are strict: no number in quotes, no 1.0 for 1, no NaN. Limits that belong to a server, not to the protocol, are
checked in `hf_paged.server.options`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

#: Fields of OpenAI's or vLLM's protocol that are not supported, and the values of them that ask for nothing.
_ASK_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "documents": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "refusal": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name in cls.model_fields
            or name not in _ASK_FOR_NOTHING
            or not (value is None or any(_same(value, v) for v in _ASK_FOR_NOTHING[name]))
        }


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class StreamOptions(Body):
    include_usage: bool | None = None


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)] = "schema"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's: exactly one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str] | None, Field(min_length=1)] = None
    grammar: str | None = None  # GBNF
    json_object: Literal[True] | None = None


class Sampling(Body):
    """What completions and chat have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Count | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # says who asks; nothing depends on it

    # --- vLLM's
    top_k: Annotated[int | None, Field(ge=-1, le=2**31 - 1)] = None  # -1 and 0: all
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None  # beyond, logits overflow
    min_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    allowed_token_ids: Annotated[list[TokenId] | None, Field(min_length=1)] = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    priority: Annotated[int | None, Field(ge=-(2**31), le=2**31 - 1)] = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str | None, Field(max_length=65536)] = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


class LoadAdapterRequest(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    load_inplace: bool | None = None


class UnloadAdapterRequest(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
