"""docs/operations.md names every metric, every error code and status, and every limit."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from typing import Any

import httpx
import pytest

from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import _TYPES
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
SOURCES = sorted((ROOT / "hf_paged" / "server").glob("*.py"))


def codes() -> set[str]:
    """The `code` of every error that the server's source makes."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            given: list[ast.expr] = [word.value for word in node.keywords if word.arg == "code"]
            if isinstance(node.func, ast.Name) and node.func.id == "bad_request":
                given += node.args[2:3]
            found |= {value.value for value in given if isinstance(value, ast.Constant) and value.value}
    return found


def test_every_error_code_and_status_is_on_the_page() -> None:
    found = codes()
    assert {"context_length_exceeded", "model_not_found", "overloaded", "queue_timeout"} <= found
    for name in (*found, *(kind for kind in _TYPES.values() if kind != "permission_error")):
        assert f"`{name}`" in PAGE, name
    for status in _TYPES.keys() - {403}:
        assert re.search(rf"\| [0-9, ]*\b{status}\b", PAGE), status


def test_every_metric_is_on_the_page(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    names -= {name for name in names if name.endswith("_created")}
    assert len(names) >= 19
    for name in names:
        assert f"`{name.removeprefix('hf_paged:')}`" in PAGE, name


@pytest.mark.parametrize("field", fields(ServerConfig), ids=lambda field: field.name)
def test_every_field_of_the_config_is_on_the_page(field: Any) -> None:
    assert f"`{field.name}`" in PAGE
