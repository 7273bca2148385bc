"""InstancePatch: attributes that shadow a method, are taken back, and never show in a copy."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
from torch import nn

from hf_paged.patches.instance import InstancePatch


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Slotted(Doubler):
    __slots__ = ("extra",)


class OwnState(Doubler):
    def __getstate__(self) -> dict:
        return vars(self) | {"saved": True}


def seven(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, 7.0)


def patched(module: nn.Module) -> InstancePatch:
    patch = InstancePatch(module)
    patch.set("forward", seven)
    return patch


def torch_saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": torch_saved,
    "replicate": lambda module: module._replicate_for_data_parallel(),
    **{
        f"pickle-{protocol}": lambda module, protocol=protocol: pickle.loads(pickle.dumps(module, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}
ONE = torch.ones(1)


def test_set_and_revert_leave_the_very_same_attributes() -> None:
    module = Doubler()
    before = dict(vars(module))
    patch = patched(module)
    assert module(ONE) == 7
    patch.revert()
    assert vars(module) == before
    assert module(ONE) == 2
    patch.revert()
    assert vars(module) == before


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", [Doubler, OwnState])
def test_copies_are_plain(cls: type[nn.Module], how: str) -> None:
    module = cls()
    plain = set(vars(COPIES[how](module)))
    patch = patched(module)
    second = InstancePatch(module)
    second.set("generate", lambda: None)
    duplicate = COPIES[how](module)
    assert set(vars(duplicate)) == plain
    if how != "replicate":  # a replica has no parameters of its own until `replicate` gives it some
        assert duplicate(ONE) == 2
    assert module(ONE) == 7, "copying must not take anything back"
    patch.revert()
    second.revert()


def test_copy_of_a_class_with_slots_is_plain() -> None:
    module = Slotted()
    patch = patched(module)
    state = module.__getstate__()
    assert "forward" not in (state[0] if isinstance(state, tuple) else state)
    patch.revert()


def test_what_the_instance_had_is_put_back_and_copied() -> None:
    module = Doubler()
    theirs = types.MethodType(lambda self, x: self.weight * x * 10, module)
    module.forward = theirs
    patch = patched(module)
    assert copy.deepcopy(module)(ONE) == 20
    patch.revert()
    assert vars(module)["forward"] is theirs


def test_a_wrapper_put_on_later_stays() -> None:
    module = Doubler()
    patch = patched(module)
    wrapped = module.forward
    wrapper = module.forward = lambda x: wrapped(x) + 1
    patch.revert()
    assert vars(module)["forward"] is wrapper
    assert "__getstate__" not in vars(module)


def test_a_value_moved_to_another_attribute_is_taken_back_there() -> None:
    """accelerate keeps what it wraps in `_old_forward`."""
    module = Doubler()
    patch = patched(module)
    module._old_forward = module.forward
    module.forward = lambda x: module._old_forward(x)
    assert copy.copy(module)._old_forward.__func__ is Doubler.forward
    patch.revert()
    assert module(ONE) == 2


def test_two_patches_of_one_module_are_independent() -> None:
    module = Doubler()
    before = dict(vars(module))
    first, second = patched(module), InstancePatch(module)
    second.set("generate", len)
    first.revert()
    assert module(ONE) == 2
    assert module.generate is len
    assert "generate" not in vars(copy.deepcopy(module))
    second.revert()
    assert vars(module) == before


def test_one_name_has_one_owner() -> None:
    module = Doubler()
    patch = patched(module)
    with pytest.raises(RuntimeError, match=r"Doubler\.forward is already patched"):
        patched(module)
    patch.revert()
    patched(module).revert()


def test_patched_module_is_freed_without_the_garbage_collector() -> None:
    module = Doubler()
    patch = patched(module)
    reference = weakref.ref(module)
    gc.collect()
    gc.disable()
    try:
        del module
        assert reference() is None
    finally:
        gc.enable()
    patch.revert()
    with pytest.raises(ReferenceError, match="gone"):
        patch.set("forward", seven)


def test_foreign_getstate_is_used_and_put_back() -> None:
    module = Doubler()

    def theirs() -> dict:
        return vars(module) | {"theirs": True}

    module.__dict__["__getstate__"] = theirs
    patch = patched(module)
    state = module.__getstate__()
    assert state["theirs"]
    assert "forward" not in state
    patch.revert()
    assert vars(module)["__getstate__"] is theirs
