"""From a checked request body to jobs for the engine, one a choice."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from hf_paged.engine.sampling import LogitsEdit
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import bad_request
from hf_paged.server.logits import Grammar, OwnLogits
from hf_paged.server.protocol import Sampling
from hf_paged.server.served_model import ServedModel

#: Temperatures below it are greedy: dividing by them would overflow.
_GREEDY_BELOW = 1e-5
#: An end of sequence that no logits have: how "none at all" is said to upstream, which replaces None and [].
_NO_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Job:
    """One sequence to generate."""

    prompt: list[int]
    config: GenerationConfig
    adapter: Any
    seed: int | None
    logprobs: int | None
    edit: LogitsEdit | None
    priority: int
    cache_salt: str
    sequences: int = 1  # beams of a search


@dataclass(frozen=True)
class Stops:
    """Where text ends and what of that is shown."""

    strings: tuple[str, ...]
    token_ids: frozenset[int]  # of these the last token is one, if a token ended the sequence
    eos_token_ids: frozenset[int]  # those of them that are the model's own
    include: bool
    min_tokens: int
    skip_special_tokens: bool


def stops_of(request: Sampling, served: ServedModel, limits: ServerConfig) -> Stops:
    """What ends the text of `request`.

    Raises:
        APIError: 400.
    """
    strings = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(strings) > limits.max_stop_strings:
        raise bad_request(f"stop: {len(strings)} texts; at most {limits.max_stop_strings}", "stop")
    for text in strings:
        if not 0 < len(text) <= limits.max_stop_chars:
            raise bad_request(
                f"stop: a text of {len(text)} characters; allowed are 1 to {limits.max_stop_chars}", "stop"
            )
    own = frozenset(() if request.ignore_eos else served.eos_token_ids)
    named = request.stop_token_ids or []
    _check_list(named, "stop_token_ids", served, limits)
    return Stops(
        strings,
        own | frozenset(named),
        own,
        bool(request.include_stop_str_in_output),
        request.min_tokens or 0,
        request.skip_special_tokens is not False,
    )


def make_jobs(
    request: Sampling,
    prompts: list[list[int]],
    served: ServedModel,
    limits: ServerConfig,
    *,
    copies: int,
    max_tokens: int | None,
    logprobs: int | None,
    stops: Stops,
    grammar: Grammar | None,
    key_salt: str,
) -> list[Job]:
    """The jobs of a request: `copies` for each prompt, prompt after prompt.

    Args:
        max_tokens: new tokens of each; None: as many as there is room for.
        logprobs: how many of the likeliest tokens to report beside each; None for none.
        key_salt: of the key the request came with.

    Raises:
        APIError: 400.
    """
    if len(prompts) * copies > limits.max_choices:
        raise bad_request(
            f"n: {len(prompts)} prompts × {copies} choices; at most {limits.max_choices} sequences a request",
            "n",
        )
    if logprobs is not None and logprobs > limits.max_logprobs:
        raise bad_request(f"logprobs: {logprobs} tokens; at most {limits.max_logprobs}", "logprobs")
    if request.priority is not None and not limits.allow_priority:
        raise bad_request("priority: not allowed on this server", "priority")
    _check_lists(request, served, limits)
    if (
        request.min_tokens
        and request.allowed_token_ids
        and stops.token_ids.issuperset(request.allowed_token_ids)
    ):
        raise bad_request(
            "allowed_token_ids: all of them end the text, which min_tokens forbids", "allowed_token_ids"
        )
    _check_lengths(request, prompts, served, max_tokens, grammar)
    adapter = served.adapter_of(request.model)
    salt = repr((key_salt, request.cache_salt)) if key_salt or request.cache_salt else ""
    jobs: list[Job] = []
    for prompt in prompts:
        config = generation_config(request, served, stops, max_tokens or served.max_len - len(prompt))
        for _copy in range(copies):
            edit = OwnLogits.of(request, served.vocab_size, grammar)
            seed = stream_seed(request.seed, len(jobs)) if config.do_sample else None
            jobs.append(Job(prompt, config, adapter, seed, logprobs, edit, request.priority or 0, salt))
    return jobs


def generation_config(
    request: Sampling, served: ServedModel, stops: Stops, max_new_tokens: int
) -> GenerationConfig:
    """The request in `generate()`'s terms. What it leaves open is the model's own `generation_config`."""
    own = served.inner.generation_config
    temperature = _first(request.temperature, own.temperature, 1.0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature >= _GREEDY_BELOW,
        num_beams=1,
        num_return_sequences=1,
        # Never fed to the model in a batch of one; upstream warns where it is open.
        pad_token_id=_first(own.pad_token_id, next(iter(served.eos_token_ids), None), 0),
        eos_token_id=sorted(stops.token_ids) or [_NO_TOKEN],
    )
    if config.do_sample:
        config.temperature = float(temperature)
        config.top_p = float(_first(request.top_p, own.top_p, 1.0))
        config.top_k = max(0, _first(request.top_k, own.top_k, 0))
        if request.min_p:
            config.min_p = request.min_p
    if request.repetition_penalty is not None:
        config.repetition_penalty = float(request.repetition_penalty)
    if request.min_tokens:
        config.min_new_tokens = request.min_tokens
    return config


def stream_seed(seed: int | None, choice: int) -> int:
    """The seed of a choice's random numbers: the request's own for the first one, others are derived from it."""
    if seed is None:
        return secrets.randbits(63)
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check_lists(request: Sampling, served: ServedModel, limits: ServerConfig) -> None:
    bias = request.logit_bias or {}
    ids = []
    for name in bias:
        if not name.isascii() or not name.isdecimal() or len(name) > 10:
            raise bad_request(f"logit_bias: {name[:40]!r} is not a token id", "logit_bias")
        ids.append(int(name))
    _check_list(ids, "logit_bias", served, limits)
    _check_list(request.allowed_token_ids or [], "allowed_token_ids", served, limits)


def _check_list(ids: list[int], param: str, served: ServedModel, limits: ServerConfig) -> None:
    if len(ids) > limits.max_token_list:
        raise bad_request(f"{param}: {len(ids)} tokens; at most {limits.max_token_list}", param)
    served.check_ids(ids, param)


def _check_lengths(
    request: Sampling,
    prompts: list[list[int]],
    served: ServedModel,
    max_tokens: int | None,
    grammar: Grammar | None,
) -> None:
    for prompt in prompts:
        room = served.max_len - len(prompt)
        if max_tokens is not None and max_tokens > room:
            raise bad_request(
                f"max_tokens: {len(prompt)} prompt tokens and {max_tokens} new ones are {len(prompt) + max_tokens}; "
                f"this model holds {served.max_len}",
                "max_tokens",
                "context_length_exceeded",
            )
        least = request.min_tokens or 0
        if least > (max_tokens or room):
            raise bad_request(
                f"min_tokens: {least} is more than max_tokens, {max_tokens or room}", "min_tokens"
            )
    if grammar is not None and (request.min_tokens or request.ignore_eos):
        name = "min_tokens" if request.min_tokens else "ignore_eos"
        raise bad_request(f"{name}: the text ends where its grammar does", name)
