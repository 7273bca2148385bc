"""What engines of this kind were attacked with or broke on: a line of the table each, and a line is a test.

After each line a neighbour's text is what it was before, and no sequence and no block is left in use.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_paged
from hf_paged.server.config import ServerConfig
from hf_paged.server.serve import make_server
from tests.helpers import ROOT, demo_model
from tests.server import security_engine as engine
from tests.server import security_requests as requests
from tests.server.security_world import World
from tests.server.support import running

LIMITS: dict[str, Any] = {"max_adapters": 3, "max_adapter_rank": 16, "grammar_timeout": 2.0}
LIMITS["grammar_cache_bytes"] = 1  # one is kept


def sources(world: World) -> None:
    """No pickle, nothing that runs what it is given, loopback by default, and no check that `python -O` drops."""
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "eval", "exec", "trust_remote_code"}
    for path in (ROOT / "hf_paged" / "server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            names += [node.func.id] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else []
            names += [keyword.arg or "" for keyword in getattr(node, "keywords", [])]
            assert not banned.intersection(names), f"{path.name}: {names}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in ("torch.load", "pickle.loads"), path.name
            if isinstance(node, ast.Assert):  # those are for the type checker
                assert "isinstance" in ast.unparse(node) or "is not None" in ast.unparse(node), path.name
    assert make_server(world.server.app, ServerConfig()).config.host == "127.0.0.1"
    answer = world.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


LINES: dict[str, Callable[[World], None]] = {
    "00-numbers": requests.numbers,
    "00-ranges": requests.ranges,
    "01-token-ids": requests.token_ids,
    "02-prompts-and-bodies": requests.prompts,
    "03-huge-n-and-best-of": requests.copies,
    "04-stop-strings": requests.stop_strings,
    "05-grammars": requests.grammars,
    "06-chat-templates": requests.templates,
    "07-adapter-names": requests.adapters,
    "08-prefix-cache": requests.prefixes,
    "09-slot-reuse": engine.slots,
    "10-keys": requests.keys,
    "11-error-bodies": requests.error_bodies,
    "12-no-pickle-loopback-no-cors": sources,
    "13-disconnects": engine.disconnects,
    "14-faults-of-one-request": engine.faults,
    "15-loop-death": engine.death,
    "16-overload": engine.overload,
    "17-shutdown": engine.shutdown,
    "18-concurrency": engine.concurrency,
    "19-preemption-storm": engine.preemption,
    "20-determinism": engine.determinism,
}


@pytest.fixture
def world(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    model = demo_model("llama")
    root = tmp_path / "adapters"
    root.mkdir()
    with running(model, tokenizer, model_names=("base",), adapter_root=root, **LIMITS) as server:
        with server.client() as client:
            yield World(server, client, monkeypatch, tmp_path)
    hf_paged.disable(model)


#: They start processes and load checkpoints; test_grammars.py and test_adapters.py hold most of it in every run.
SLOW = {"05-grammars", "07-adapter-names"}


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] * (line in SLOW)) for line in LINES]
)
def test_security(world: World, line: str) -> None:
    before = world.text()
    LINES[line](world)
    if hf_paged.is_enabled(world.model) and world.server.state.served.engine is world.engine:
        assert world.text() == before
        world.server.wait_until_empty()
        assert world.client.get("/health").is_success
