"""Which grammar a request asks for, and what of it cannot be enforced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_paged.server.errors import bad_request
from hf_paged.server.protocol import Sampling, StructuredOutputs

#: Keywords of JSON Schema that the compiler would leave out: a text could break them.
_NOT_ENFORCED = frozenset(
    {
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "multipleOf",
        "not",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
#: Keywords with schemas inside: by name, in a list, or one.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "additionalItems")


@dataclass(frozen=True)
class GrammarRequest:
    """A grammar to be compiled."""

    kind: str  # "schema", "object" (any JSON object), "regex" or "grammar"
    text: str
    param: str = field(compare=False)  # the field it came in


def grammar_request(body: Sampling, max_bytes: int) -> GrammarRequest | None:
    """What `body` asks its text to follow; None for nothing.

    Raises:
        APIError: 400.
    """
    wanted, outputs = body.response_format, body.structured_outputs
    if wanted is not None and wanted.type != "json_schema" and wanted.json_schema is not None:
        raise bad_request("response_format.json_schema: only with type json_schema", "response_format")
    plain = wanted is None or wanted.type == "text"
    if not plain and outputs is not None:
        raise bad_request("structured_outputs: not together with response_format", "structured_outputs")
    if outputs is not None:
        request = _of_outputs(outputs)
    elif wanted is None or plain:
        return None
    elif wanted.type == "json_object":
        return GrammarRequest("object", '{"type":"object"}', "response_format")
    elif wanted.json_schema is None:
        raise bad_request("response_format.json_schema: missing", "response_format")
    else:
        request = _schema(wanted.json_schema.schema_, "response_format")
    size = len(request.text.encode())
    if size > max_bytes:
        raise bad_request(f"{request.param}: {size} bytes; at most {max_bytes}", request.param)
    return request


def _of_outputs(outputs: StructuredOutputs) -> GrammarRequest:
    param = "structured_outputs"
    given = [name for name in StructuredOutputs.model_fields if getattr(outputs, name) is not None]
    if len(given) != 1:
        raise bad_request(f"{param}: exactly one of json, regex, choice, grammar and json_object", param)
    if outputs.regex is not None:
        return GrammarRequest("regex", outputs.regex, param)
    if outputs.grammar is not None:
        return GrammarRequest("grammar", outputs.grammar, param)
    if outputs.choice is not None:
        if not all(outputs.choice):
            raise bad_request(f"{param}.choice: a text is empty", param)
        texts = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(outputs.choice))
        return GrammarRequest("grammar", f"root ::= {' | '.join(texts)}\n", param)
    if outputs.json_object is not None:
        return GrammarRequest("object", '{"type":"object"}', param)
    schema = outputs.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise bad_request(f"{param}.json: it is not JSON", param) from None
    return _schema(schema, param)


def _schema(schema: Any, param: str) -> GrammarRequest:
    if not isinstance(schema, dict):
        raise bad_request(f"{param}: a schema must be a JSON object", param)
    try:
        for part in _parts(schema):
            _check_part(part, param)
        return GrammarRequest("schema", json.dumps(schema), param)
    except RecursionError:
        raise bad_request(f"{param}: the schema is nested too deeply", param) from None


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those inside of it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in _NAMED:
        if isinstance(schema.get(name), dict):
            for part in schema[name].values():
                yield from _parts(part)
    for name in _LISTED:
        if isinstance(schema.get(name), list):
            for part in schema[name]:
                yield from _parts(part)
    for name in _SINGLE:
        yield from _parts(schema.get(name))


def _check_part(part: dict[str, Any], param: str) -> None:
    for name in part:
        if name in _NOT_ENFORCED:
            raise bad_request(f"{param}: {name} in a schema is not supported", param)
    reference = part.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        raise bad_request(f"{param}: $ref may only point into the schema itself", param)
