"""Whose requests are failed when weights change under them, and at which step."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import torch

from hf_paged.engine.adapters import Selection
from hf_paged.engine.namespaces import NamespaceMaker
from hf_paged.engine.weights_guard import WeightsGuard
from tests.helpers import make_model
from tests.integrations.peft_models import config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

A, B = Selection(("a",)), Selection(("b",))


class Sequence:
    def __init__(self, model: Any, adapters: Selection | None) -> None:
        self.adapters = adapters
        maker = NamespaceMaker("", lambda: None)
        self.namespace = maker.make(model, [adapters], 0, "")[adapters]


@pytest.fixture
def model() -> Any:
    return peft_model("llama", {"a": config("llama"), "b": config("llama", r=8)}).base_model.model


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> WeightsGuard:
    """One that never looks because it is time to: what it finds, a trace has told."""
    monkeypatch.setattr(WeightsGuard, "_FIRST_AFTER_S", 1e9)
    monkeypatch.setattr(WeightsGuard, "_SHARE", 1e12)
    return WeightsGuard()


def edit(model: Any, name: str) -> None:
    """One number of one matrix of the adapter."""
    layer = [module for module in model.modules() if hasattr(module, "lora_A")][-1]
    with torch.no_grad():
        layer.lora_B[name].weight[0, 0] += 1


def test_an_edit_is_found_at_the_next_step_of_its_adapter(model: Any, guard: WeightsGuard) -> None:
    a, b = Sequence(model, A), Sequence(model, B)
    for _ in range(3):
        assert not guard.changed(model, [a, b], [a, b])
    edit(model, "b")
    assert guard.changed(model, [a, b], [a, b]) == [b]
    assert not guard.changed(model, [a], [a])
    edit(model, "a")
    assert guard.changed(model, [a], [a]) == [a]


def test_only_adapters_of_the_step_are_looked_at(model: Any, guard: WeightsGuard) -> None:
    a = Sequence(model, A)
    for _ in range(2):
        guard.changed(model, [a], [a])
    compared = []
    guard._compare = lambda *arguments: compared.append(arguments) or []  # type: ignore[method-assign]
    edit(model, "b")
    assert not guard.changed(model, [a], [a])
    assert not compared
    edit(model, "a")
    guard.changed(model, [a], [a])
    assert compared


def test_who_stood_by_is_told_at_its_next_step(model: Any, guard: WeightsGuard) -> None:
    a, b = Sequence(model, A), Sequence(model, B)
    for _ in range(2):
        guard.changed(model, [a, b], [a, b])
    edit(model, "b")
    assert not guard.changed(model, [a], [a, b])
    assert guard.changed(model, [a, b], [a, b]) == [b]


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_who_stands_by_while_others_notice_is_told_with_them(
    model: Any, guard: WeightsGuard, what: str
) -> None:
    a, other = Sequence(model, A), Sequence(model, A)
    for _ in range(2):
        guard.changed(model, [a, other], [a, other])
    if what == "adapter":
        edit(model, "a")
    else:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    assert guard.changed(model, [a], [a, other]) == [a, other]


@pytest.mark.parametrize("late", [False, True])
def test_an_edit_between_a_call_and_its_first_step(model: Any, guard: WeightsGuard, late: bool) -> None:
    """Others run meanwhile: the prefixes that the call was promised are those of before."""
    a, b = Sequence(model, A), Sequence(model, B)
    for _ in range(2):
        guard.changed(model, [a], [a])
    if late:
        edit(model, "b")
    assert guard.changed(model, [a, b], [a, b]) == ([b] if late else [])


def test_what_is_active_is_watched_whatever_it_is(model: Any, guard: WeightsGuard) -> None:
    seq = Sequence(model, None)
    for _ in range(2):
        guard.changed(model, [seq], [seq])
    edit(model, "b")
    assert guard.changed(model, [seq], [seq]) == [seq]


def test_another_models_training_is_looked_into_once(guard: WeightsGuard) -> None:
    from hf_paged.engine.weights import watch_optimizers

    watch_optimizers()
    model, other = make_model("llama"), torch.nn.Linear(2, 2)
    seq = Sequence(model, None)
    for _ in range(2):
        guard.changed(model, [seq], [seq])
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters()).step()
    compared = []
    compare = guard._compare
    guard._compare = lambda *arguments: compared.append(1) or compare(*arguments)  # type: ignore[method-assign]
    for _ in range(2):
        assert not guard.changed(model, [seq], [seq])
    assert len(compared) == 1


def test_weights_of_inference_mode_have_no_trace(guard: WeightsGuard) -> None:
    model = make_model("llama")
    with torch.inference_mode():
        weight = model.lm_head.weight.detach() * 2
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    seq = Sequence(model, None)
    for _ in range(3):
        assert not guard.changed(model, [seq], [seq])


def test_alone_and_undisturbed_no_trace_is_looked_for(model: Any, guard: WeightsGuard) -> None:
    a = Sequence(model, A)
    for _ in range(2):
        guard.changed(model, [a], [a], undisturbed=True)
    edit(model, "a")
    if len(sys._current_frames()) == 1:
        assert not guard.changed(model, [a], [a], undisturbed=True)
    assert guard.changed(model, [a], [a]) == [a]


def test_beside_another_thread_a_trace_is_looked_for(model: Any, guard: WeightsGuard) -> None:
    a = Sequence(model, A)
    for _ in range(4):
        assert not guard.changed(model, [a], [a], undisturbed=True)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        edit(model, "a")
        assert guard.changed(model, [a], [a], undisturbed=True) == [a]
    finally:
        stop.set()
        other.join()


def test_alone_other_edits_are_found_in_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightsGuard, "_FIRST_AFTER_S", 0.0)
    guard, a = WeightsGuard(), Sequence(model, A)
    for _ in range(3):
        assert not guard.changed(model, [a], [a], undisturbed=True)
    model.lm_head.weight.data[0, 0] += 1
    end = time.monotonic() + 20
    while not (stale := guard.changed(model, [a], [a], undisturbed=True)) and time.monotonic() < end:
        time.sleep(0.01)
    assert stale == [a]


def test_what_another_thread_did_and_ended_is_found(model: Any, guard: WeightsGuard) -> None:
    a = Sequence(model, A)
    stop, here = threading.Event(), threading.Event()

    def run() -> None:
        here.set()
        stop.wait()
        edit(model, "a")

    for _ in range(3):
        assert not guard.changed(model, [a], [a], undisturbed=True)
    other = threading.Thread(target=run)
    other.start()
    here.wait()
    assert not guard.changed(model, [a], [a], undisturbed=True)
    stop.set()
    other.join()
    assert guard.changed(model, [a], [a], undisturbed=True) == [a]


def test_who_was_not_in_the_step_after_a_disturbance_is_looked_at(model: Any, guard: WeightsGuard) -> None:
    a, b = Sequence(model, A), Sequence(model, B)
    for _ in range(3):
        assert not guard.changed(model, [a, b], [a, b], undisturbed=True)
    edit(model, "a")
    assert not guard.changed(model, [b], [b], undisturbed=False)
    assert guard.changed(model, [a], [a], undisturbed=True) == [a]
