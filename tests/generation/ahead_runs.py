"""What tests of steps ahead share: the switch, engines whose texts end early, and a look at the order of events.

On the reference's kernels: on a CPU there is nothing to be ahead of, so a private switch puts the steps there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import hf_paged
from hf_paged.engine import registry, runtime
from hf_paged.engine.ahead import StepsAhead
from hf_paged.engine.device_sampling import ChosenTokens
from hf_paged.engine.model_runner import ModelRunner

#: Ends about every eighth text of the random models at each token.
ENDS = list(range(3, 128, 8))
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


def switched(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """From now on new engines go ahead, or step by step, whatever their backend."""
    monkeypatch.setattr(runtime, "make_ahead", lambda backend, devices: StepsAhead() if ahead else None)


def engine_of(model: Any) -> Any:
    engine = registry.get(model)
    assert engine is not None
    return engine


@contextlib.contextmanager
def enabled(model: Any, **options: Any) -> Iterator[Any]:
    options = {"backend": "reference", "block_size": 4, "fallback": "error"} | options
    with hf_paged.enabled(model, **options):
        yield model


class Watched:
    """In which order steps were launched and their tokens waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        forward, wait = ModelRunner.forward, ChosenTokens.wait

        def launched(runner: Any, *args: Any) -> Any:
            self.events.append("launch")
            return forward(runner, *args)

        def waited(tokens: Any) -> Any:
            self.events.append("wait")
            return wait(tokens)

        monkeypatch.setattr(ModelRunner, "forward", launched)
        monkeypatch.setattr(ChosenTokens, "wait", waited)
