"""Requests that are wrong, huge or hostile, by the field they attack; tests send them, and so does the soak."""

from __future__ import annotations

import json
from typing import Any

PROMPT: dict[str, Any] = {"prompt": "The list of", "max_tokens": 4}

#: Numeric fields of /v1/completions, and what is a number for none of them, as JSON is written.
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "best_of",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "priority",
    "length_penalty",
)
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "true", '"1"', "[]", "{}", "-1e308", "1e308")
NO_NUMBERS += ("9" * 25, "1" + "0" * 400, "-" + "9" * 25)

#: Values beyond a field's range, of the right kind otherwise.
OUTSIDE: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 2.1),
    "top_p": (0, -0.0, 1.1),
    "top_k": (-2, 1.5),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 5e-324, 101),
    "seed": (2**63, -(2**63) - 1, 0.5),
    "n": (0, -1, 129, 10**6),
    "best_of": (0, 129, 10**6),
    "max_tokens": (0, -1, 1021, 2**31 - 1),
    "min_tokens": (-1, 5, 2**31 - 1),
    "logprobs": (-1, 21, 2**31 - 1),
    "length_penalty": (-10.5, 2, 11),
    "stop": ("", ["x", ""], ["x"] * 17, "x" * 100_000),
    "prompt": ("x " * 100_000, [5] * 1024, [], {}, [[]]),
}
#: No token ids of the demo model, whose logits have 1024 columns.
NO_TOKENS: tuple[list[Any], ...] = ([-1], [1024], [2**31], [10**30], [1.5], [True], [None], [[]])
TOKEN_LISTS = ("prompt", "stop_token_ids", "allowed_token_ids")
NO_GRAMMARS: tuple[dict[str, Any], ...] = (
    {"regex": "("},
    {"regex": "a{2,1}"},
    {"regex": "a" * 70_000},
    {"grammar": "root ::= nothing"},
    {"json": "{"},
    {"json": {"type": "nothing"}},
    {"json": {"type": "string", "pattern": "("}},
    {"json": {"$ref": "file:///etc/passwd"}},
    {"json": {"$ref": "http://127.0.0.1/x.json"}},
    {"json": {"$ref": "#/$defs/nothing"}},
    {"choice": [""]},
)
NO_JSON: tuple[bytes, ...] = (
    b"",
    b"{",
    b"null",
    b"\xff\xfe",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"prompt": "x"} trailing',
)
TEMPLATES: tuple[dict[str, Any], ...] = (
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template": "{{ ''.__class__.__mro__ }}"},
    {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"add_generation_prompt": False}},
)
USER = {"role": "user", "content": "x"}
NAMES = ("../x", "/etc/passwd", "https://127.0.0.1/x", "file:one", "org/adapter", "__base__", "x" * 10_000)


def raw(**fields: str) -> bytes:
    """JSON of a completion request, fields as they are to be written."""
    written = {name: json.dumps(value) for name, value in PROMPT.items()} | fields
    return ("{" + ",".join(f'"{name}":{value}' for name, value in written.items()) + "}").encode()


def bodies() -> list[tuple[str, bytes]]:
    """(route, body) of every request above that is wrong: each must be answered with a 4xx."""
    route = "/v1/completions"
    found = [(route, raw(**{name: value})) for name in NUMBERS for value in NO_NUMBERS]
    found += [(route, raw(**{n: json.dumps(v)})) for n, values in OUTSIDE.items() for v in values]
    found += [(route, raw(**{n: json.dumps(v)})) for n in TOKEN_LISTS for v in NO_TOKENS]
    found += [(route, raw(logit_bias=json.dumps({key: 1}))) for key in ("-1", "1024", "x", "1.0", "9" * 30)]
    found += [(route, raw(structured_outputs=json.dumps(wanted))) for wanted in NO_GRAMMARS]
    found += [(route, body) for body in NO_JSON]
    found += [(route, raw(model=json.dumps(name))) for name in NAMES]
    chats = [{"messages": [USER]} | template for template in TEMPLATES]
    chats += [{"messages": [USER] * 10_000}, {"messages": []}, {"messages": [{"role": "x", "content": "x"}]}]
    return found + [("/v1/chat/completions", json.dumps(chat).encode()) for chat in chats]
