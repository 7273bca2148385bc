"""The model behind a server: its names, its tokenizer, its limits, and which adapter a name stands for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

import hf_paged
from hf_paged.engine import registry
from hf_paged.engine.adapters import BASE
from hf_paged.errors import ConfigError
from hf_paged.resolve import resolve_model
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, bad_request
from hf_paged.server.protocol import Message

#: How often a prompt may be longer, in characters, than the longest tokens could make it, before it is
#: refused without being tokenised: normalisers may drop characters, spaces say.
_SHRINKING = 4


class ServedModel:
    """An enabled model with its tokenizer.

    Args:
        model: enabled; a model, a pipeline or a PeftModel.
        tokenizer: of the model, a fast one.

    Raises:
        ConfigError: a tokenizer that is not fast, or a length that the model or the KV cache cannot hold.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ServerConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise ConfigError(f"tokenizer={kind}: must be a fast one, which decodes tokens as they come")
        self.model = model
        self.inner = resolve_model(model)
        self.tokenizer = tokenizer
        self.names = config.model_names
        self.created = int(time.time())
        self.client = hf_paged.engine(model)
        self._base = self._standing()
        limits = [self.client.max_length, getattr(self.inner.config, "max_position_embeddings", None)]
        most = min(limit for limit in limits if limit is not None)
        if config.max_model_len is not None and config.max_model_len > most:
            raise ConfigError(f"max_model_len={config.max_model_len}: model and KV cache hold {most} tokens")
        self.max_len = config.max_model_len or most
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        tokenizer.encode("a")  # what a first text sets in a tokenizer no two threads may set at once

    @property
    def engine(self) -> Any:
        """The engine; None once the model is not enabled any more."""
        return registry.get(self.inner)

    @cached_property
    def vocab_size(self) -> int:
        """Ids that a request may name: rows of the embedding and of the logits, whatever the tokenizer knows."""
        tables = (self.inner.get_input_embeddings(), self.inner.get_output_embeddings())
        return min(table.weight.shape[0] for table in tables if table is not None)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.inner.generation_config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)

    # --- names and adapters -------------------------------------------------------------------------------------------

    def _standing(self) -> Any:
        """The adapter choice that keeps meaning what the model is now, whatever is loaded or activated later."""
        adapters = self.engine.adapters
        current = adapters.current()
        if current is None and adapters.names():
            return None  # merged into the weights: nothing else can be chosen
        return list(current.names) if current is not None and current.names else BASE

    @property
    def standing(self) -> tuple[str, ...]:
        """The adapters that the base model's names stand for, of a PEFT checkpoint that is served say."""
        return tuple(self._base) if isinstance(self._base, list) else ()

    def adapters(self) -> list[str]:
        """The adapters that requests can name."""
        engine = self.engine
        known = engine.adapters.names() if engine is not None else ()
        return sorted(name for name in known if name not in self.standing and name not in self.names)

    def adapter_of(self, name: str | None) -> Any:
        """The adapter choice a request's `model` stands for.

        Raises:
            APIError: 404.
        """
        if name is None or name in self.names:
            return self._base
        if name in self.adapters():
            return name
        raise APIError(404, f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        common = {"object": "model", "created": self.created, "owned_by": "hf_paged"}
        base = [
            common | {"id": name, "root": name, "parent": None, "max_model_len": self.max_len}
            for name in self.names
        ]
        tuned = [common | {"id": name, "root": name, "parent": self.names[0]} for name in self.adapters()]
        return base + tuned

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool, truncate: int | None = None) -> list[int]:
        """Token ids of a prompt, at least one and at most `max_len`; the last `truncate` of them.

        Raises:
            APIError: 400.
        """
        if truncate is None and len(text) > self.max_len * self._longest_token * _SHRINKING:
            raise self.too_long(f"a text of {len(text)} characters")
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.checked(ids, truncate)

    def checked(self, ids: list[int], truncate: int | None = None) -> list[int]:
        """Token ids as a prompt: not empty, of this model, with room for a new token.

        Raises:
            APIError: 400.
        """
        if truncate is not None:
            ids = ids[-truncate:]
        if not ids:
            raise bad_request("the prompt is empty: at least one token is needed", "prompt")
        if len(ids) >= self.max_len:
            raise self.too_long(f"{len(ids)} tokens")
        self.check_ids(ids, "prompt")
        return ids

    def too_long(self, what: str) -> APIError:
        return bad_request(
            f"the prompt is too long: {what}; this model holds {self.max_len} tokens with the answer",
            "prompt",
            "context_length_exceeded",
        )

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises APIError (400) if an id is outside of the model's logits."""
        worst = max(ids, default=0)
        if worst >= self.vocab_size or min(ids, default=0) < 0:
            raise bad_request(
                f"{param}: token id {worst} is outside of 0..{self.vocab_size - 1}",
                param,
            )

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt that the model's own chat template makes of `messages`.

        Raises:
            APIError: 400, what the template refuses among it.
        """
        if not self.tokenizer.chat_template:
            raise bad_request("this model has no chat template: use /v1/completions", "messages")
        try:
            return self.tokenizer.apply_chat_template(
                [plain(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except TemplateError as error:
            raise bad_request(
                f"the chat template refuses these messages: {error.message}", "messages"
            ) from None
        except ValueError as error:
            raise bad_request(f"messages: {error}", "messages") from None


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    result: dict[str, Any] = {"role": message.role, "content": "" if content is None else content}
    return result if message.name is None else result | {"name": message.name}
