"""`hf-paged env`: what this installation runs on, for bug reports."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False) -> None:
    """Print versions, CPU, memory, GPUs and backends."""
    from hf_paged._env import environment

    facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts):
        typer.echo(line)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            for number, item in enumerate(value):
                lines += [f"{indent}{key} {number}:", *_lines(item, indent + "  ")]
        elif isinstance(value, list | tuple):
            lines.append(f"{indent}{key}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{indent}{key}: {'not installed' if value is None else value}")
    return lines
