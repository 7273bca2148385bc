"""`ServerConfig`: every limit of the server, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_paged.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Limits and names of a server. All sizes are checked before anything of that size is made."""

    model_names: tuple[str, ...] = ("model",)  # what `model` may say for the base model; the first is shown
    api_keys: tuple[str, ...] = ()  # any of them opens every route but /health; none: everything is open
    max_model_len: int | None = (
        None  # prompt and new tokens of a request; None: what model and cache can hold
    )

    # --- admission: beyond these a request is turned away with 429
    max_sequences: int = 512  # running and waiting; a request counts as all of its choices
    max_prompt_tokens: int = 2**20  # of all of them together

    # --- one request: beyond these it is refused with 400
    max_choices: int = 128  # prompts × best_of
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_chars: int = 256  # of one stop string
    max_token_list: int = 1024  # entries of logit_bias, stop_token_ids, allowed_token_ids
    max_body_bytes: int = 8 * 2**20  # 413

    #: Of all streams together; beyond, tokens that came meanwhile share an event.
    max_events_per_second: int = 1000

    # --- seconds
    request_timeout: float = 600.0  # from the whole body to the last byte: 504, or an error event in a stream
    queue_timeout: float | None = None  # to the first token: 503
    body_timeout: float = 30.0  # for a client to send its body: 408
    write_timeout: float = 60.0  # for a client to take a part of its answer; then it is disconnected
    drain_timeout: float = 30.0  # for running requests after SIGTERM
    stalled_after: float = 120.0  # a step that runs for longer makes /health fail

    # --- what clients may ask for only if the owner says so
    allow_priority: bool = False  # `priority` of a request
    cors_origins: tuple[str, ...] = ()  # for browsers; none: no CORS headers

    # --- adapters
    adapter_root: Path | None = (
        None  # /v1/load_lora_adapter takes folders below it; None: there is no such route
    )
    max_adapters: int = 64
    max_adapter_rank: int = 256

    # --- structured output
    grammar_timeout: float = 10.0  # seconds to compile one: 400
    max_grammar_bytes: int = 65536  # of a schema, grammar or regular expression: 400
    grammar_cache_bytes: int = 2**26  # of compiled ones that are kept

    vllm_metric_names: bool = False  # metrics also as "vllm:...", for dashboards made for vLLM

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                self._check(field.name, value, type(value) is int and value >= 1, "an int of at least 1")
            elif field.type == "bool":
                self._check(field.name, value, type(value) is bool, "True or False")
            elif field.type in ("float", "float | None"):
                given = value is not None or field.type == "float"
                right = type(value) in (int, float) and math.isfinite(value) and value > 0
                self._check(field.name, value, right or not given, "a number of seconds above 0")
            elif field.type == "tuple[str, ...]":
                right = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
                self._check(
                    field.name, value if field.name != "api_keys" else "...", right, "a tuple of texts"
                )
        length = self.max_model_len
        self._check(
            "max_model_len",
            length,
            length is None or (type(length) is int and length >= 2),
            "None or an int of at least 2",
        )
        root = self.adapter_root
        self._check(
            "adapter_root",
            root,
            root is None or (isinstance(root, Path) and root.is_dir()),
            "a folder, as a Path",
        )
        self._check("model_names", self.model_names, bool(self.model_names), "at least one name")

    @staticmethod
    def _check(name: str, value: Any, right: bool, allowed: str) -> None:
        if not right:
            raise ConfigError(f"{name}={value!r}: must be {allowed}")
