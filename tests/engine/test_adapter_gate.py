"""Sequences start once their adapters can be in the model; nobody is overtaken for ever."""

from __future__ import annotations

from collections.abc import Iterable

from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.adapters import Selection
from hf_paged.engine.request import Call, Sequence


class Host:
    """Room for `most` adapters; those in use stay."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.inside: list[str] = []
        self.loads: dict[str, int] = {}

    def bring_in(self, selections: Iterable[Selection], in_use: Iterable[Selection]) -> bool:
        wanted = {name for s in selections for name in s.names}
        if "broken" in wanted:
            raise OSError("cannot be read")
        stay = {name for s in in_use for name in s.names} & set(self.inside)
        if len(stay | wanted) > self.most:
            return False
        for name in wanted - set(self.inside):
            self.loads[name] = self.loads.get(name, 0) + 1
        self.inside = list(stay | wanted)
        return True

    def num_loads(self, selection: Selection) -> int:
        return sum(self.loads.get(name, 0) for name in selection.names)


def sequence(*names: str) -> Sequence:
    seq = Call(sampling=None).add_row([1, 2, 3], 4)
    seq.adapters = Selection(names)
    return seq


def gate(most: int) -> tuple[AdapterGate, list[Sequence]]:
    renewed: list[Sequence] = []
    return AdapterGate(Host(most), renewed.append), renewed


def test_what_runs_leaves_room_or_not() -> None:
    guard, renewed = gate(2)
    a, b, c = sequence("a"), sequence("b"), sequence("c")
    guard.begin()
    assert guard.admits([a], [])
    assert guard.moved
    assert guard.admits([b], [a])
    assert not guard.admits([c], [a, b])
    assert guard.admits([sequence()], [a, b]), "the base model needs no adapter"
    assert guard.admits([c], [b])
    assert [s.adapters for s in renewed] == [s.adapters for s in (a, b, c)]


def test_a_namespace_is_renewed_when_the_adapter_was_read_again_only() -> None:
    guard, renewed = gate(1)
    a, b = sequence("a"), sequence("b")
    assert guard.admits([a], [])
    assert guard.admits([a], [])
    assert renewed == [a]
    assert guard.admits([b], [])
    assert guard.admits([a], [])
    assert renewed == [a, b, a]


def test_rows_of_a_call_that_follow_have_the_namespace_too() -> None:
    guard, renewed = gate(1)
    a = sequence("a")
    twin = a.call.add_row([1, 2, 3], 4)
    twin.adapters = a.adapters
    assert guard.admits([a], [])
    assert set(renewed) == {a, twin}


def test_what_cannot_be_read_fails_its_call() -> None:
    guard, _ = gate(1)
    broken = sequence("broken")
    assert not guard.admits([broken], [])
    ((call, error),) = guard.failed
    assert call is broken.call
    assert str(error) == "cannot be read"
    assert guard.admits([sequence("a")], [])


def test_nobody_is_overtaken_for_ever() -> None:
    guard, _ = gate(1)
    running, waiting = sequence("a"), sequence("b")
    assert guard.admits([running], [])
    passed = 0
    for _ in range(1000):
        guard.begin()
        assert not guard.admits([waiting], [running])
        later = sequence("a")
        if not guard.admits([later], [running]):
            break
        passed += 1
    assert 10 < passed < 200
    guard.begin()
    assert guard.admits([waiting], [])
    guard.begin()
    assert guard.admits([sequence("b")], [waiting])
