"""PEFT adapters from checkpoint folders: loaded, replaced and removed while a model serves requests.

An adapter comes in whole or not at all, from safetensors only: a pickle runs whatever code its author put into it.
Requests that run are waited for before anything about the adapters changes, and new ones wait meanwhile, so that no
request ever sees half of a change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_paged.engine import registry
from hf_paged.engine.adapters import BASE
from hf_paged.errors import InvalidRequestError
from hf_paged.integrations.peft_residency import Residency
from hf_paged.resolve import resolve_model

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: What the copy is called that is tried out before an adapter is replaced.
_TRIAL = "hf_paged_trial"


def load_adapter(model: Any, folder: str | Path, name: str, *, replace: bool = False) -> None:
    """Loads a PEFT checkpoint into `model` as adapter `name`; which adapters are active stays as it is.

    Args:
        model: a PeftModel, or an HF model, enabled or not.
        folder: of the checkpoint, on this machine: `adapter_config.json` and `adapter_model.safetensors`.
        name: requests choose the adapter by it.
        replace: whether there may be an adapter of this name, whose place the new one takes.

    Raises:
        InvalidRequestError: a bad name, no such checkpoint, one that is a pickle, one for another model, or one with
            values that are not numbers. The model is as it was before.
    """
    check_name(name)
    path = checkpoint_folder(folder)
    check_values(path)
    with _quiet_model(model) as holder:
        residency = _residency(model)
        present = [*_loaded(holder), *(() if residency is None else residency.names())]
        if name in present and not replace:
            raise InvalidRequestError(
                f"adapter {name!r} is loaded already; unload it first, or give replace=True"
            )
        active = active_adapters(holder)
        if name in present:
            load_into(holder, path, _TRIAL)
            holder.delete_adapter(_TRIAL)
            if residency is not None:
                residency.forget(name)
            if name in _loaded(holder):
                holder.delete_adapter(name)
        load_into(holder, path, name)
        set_active(holder, active)
        if residency is not None:
            _register(model, residency, name, holder, path)


def unload_adapter(model: Any, name: str) -> None:
    """Removes adapter `name`, after the requests that run with it.

    Raises:
        InvalidRequestError: there is none of this name.
    """
    with _quiet_model(model) as holder:
        residency = _residency(model)
        known = dict.fromkeys([*_loaded(holder), *(() if residency is None else residency.names())])
        if name not in known:
            raise InvalidRequestError(f"adapter {name!r} is not loaded; loaded: {', '.join(known) or 'none'}")
        if residency is not None:
            residency.forget(name)
        if name in _loaded(holder):
            holder.delete_adapter(name)


def check_name(name: str) -> None:
    """Refuses names that PEFT cannot keep, or that would lead out of a folder where adapters are kept by name.

    Raises:
        InvalidRequestError: with what is allowed.
    """
    allowed = isinstance(name, str) and 0 < len(name) <= 128 and all(c.isalnum() or c in "_- " for c in name)
    if not allowed or name in (BASE, _TRIAL):
        raise InvalidRequestError(
            f"adapter name {name!r}: must be 1 to 128 letters, digits, spaces, '_' or '-', and not {BASE!r}"
        )


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` looks like a PEFT checkpoint."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def checkpoint_folder(folder: str | Path) -> Path:
    """The path of a PEFT checkpoint with safetensors.

    Raises:
        InvalidRequestError: it is none.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise InvalidRequestError(f"{folder}: no {CONFIG} there, so not a PEFT checkpoint")
    if not (path / WEIGHTS).is_file():
        why = ""
        if (path / PICKLE).exists():
            why = f". {PICKLE} is a pickle, which runs its author's code when read: save with safe_serialization=True"
        raise InvalidRequestError(f"{folder}: no {WEIGHTS} there{why}")
    return path


def base_of(folder: str | Path) -> str:
    """The base model a PEFT checkpoint was trained on: a folder or hub id.

    Raises:
        InvalidRequestError: its config names none.
    """
    path = checkpoint_folder(folder)
    base = json.loads((path / CONFIG).read_text()).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InvalidRequestError(
            f"{folder}: {CONFIG} names no base model; give the base and the adapter by itself"
        )
    return base


@contextmanager
def _quiet_model(model: Any) -> Iterator[Any]:
    """Whoever manages the adapters of `model`, while no request runs."""
    inner = resolve_model(model)
    holder = model if hasattr(type(model), "load_adapter") else inner
    engine = registry.get(inner)
    if engine is None:
        yield holder
        return
    with engine.paused():
        yield holder
        if engine.adapters is not None:
            engine.adapters.sync()


def _residency(model: Any) -> Residency | None:
    """What bounds the number of adapters in `model`; None where nothing does."""
    engine = registry.get(resolve_model(model))
    return None if engine is None else getattr(engine.adapters, "residency", None)


def _register(model: Any, residency: Residency, name: str, holder: Any, path: Path) -> None:
    """Lets adapter `name` leave the model, unless it is of a kind that has to be seen there before a call runs."""
    adapters: Any = registry.get(resolve_model(model)).adapters  # type: ignore[union-attr]
    adapters.sync()
    served = adapters.paths().get(name)
    if served is not None and adapters.problem() is None and adapters.problem_of((name,)) is None:
        residency.register(name, holder, path.resolve(), served)


def _loaded(holder: Any) -> list[str]:
    return list(getattr(holder, "peft_config", None) or {})


def active_adapters(holder: Any) -> list[str]:
    """The names of those that the model itself runs with."""
    if not _loaded(holder):
        return []
    active = holder.active_adapters
    return list(active() if callable(active) else active)


def set_active(holder: Any, names: list[str]) -> None:
    """Makes `names` the active adapters again, if there were any."""
    if names:
        holder.set_adapter(names[0] if len(names) == 1 else names)


def check_values(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise InvalidRequestError(f"{path}: {key} has values that are not numbers")
    except SafetensorError as error:
        raise InvalidRequestError(f"{path / WEIGHTS}: not a safetensors file ({error})") from None


def load_into(holder: Any, path: Path, name: str) -> None:
    """Loads, or leaves nothing of it behind."""
    before = active_adapters(holder)
    try:
        if hasattr(holder, "base_model") and hasattr(type(holder), "get_base_model"):
            result = holder.load_adapter(str(path), name, torch_device=str(resolve_model(holder).device))
        else:
            result = holder.load_adapter(str(path), name)
        missing = getattr(result, "missing_keys", None) or ()
        wrong = [k for k in missing if name in k.split(".")] + list(
            getattr(result, "unexpected_keys", None) or ()
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights do not belong to this model, {sorted(wrong)[0]!r} for one"
            )
    except Exception as error:
        if name in _loaded(holder):
            holder.delete_adapter(name)
        set_active(holder, before)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidRequestError(
            f"{path}: cannot be loaded into this model: {' '.join(lines[:3])}"
        ) from error
