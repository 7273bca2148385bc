"""`PagedConfig`: every option of the engine, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from hf_paged.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class PagedConfig:
    """Options of an enabled model. Nothing is allocated until the first native call."""

    block_size: int = 16  # tokens a KV block holds
    kv_cache_memory: int | str | None = (
        None  # most bytes of KV ("2GiB"); None: half of what is free, taken as needed
    )
    max_num_seqs: int = 256  # sequences in one step
    max_num_batched_tokens: int | None = None  # tokens in one step; None: by device
    prefix_caching: bool = True  # keep full blocks of finished requests for later prompts that begin alike
    #: "auto": the model's dtype. "int8": about a quarter of float32's memory, half of bfloat16's; keys and values are
    #: rounded, so that results are near those of `generate` and not equal to them.
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    backend: Literal["auto", "triton", "cpu", "reference"] = "auto"
    cuda_graphs: Literal["auto"] | bool = "auto"  # capture decode steps on CUDA
    fallback: Literal["warn", "silent", "error"] = (
        "warn"  # what happens when a call cannot be served natively
    )
    #: A request's tokens and log-probabilities are the same bits alone, in any batch, preempted, chunked or with a
    #: prefix hit. CPU only so far. A call that would fall back raises instead, whatever `fallback` says.
    deterministic: bool = False
    #: Adapters loaded from folders (`load_adapter`) that are in the model at a time; others come back when
    #: a request wants them. None: all of them.
    max_resident_adapters: int | None = None
    #: Most bytes ("2GiB") of host memory for those that are out of the model; beyond that they are read again. None:
    #: an eighth of what is free, but nothing for a model that is in host memory itself.
    adapter_host_memory: int | str | None = None
    cache_salt: str = ""  # prefixes are only shared between requests of one salt

    def __post_init__(self) -> None:
        _check_int("block_size", self.block_size, 1, 1024)
        _check_int("max_num_seqs", self.max_num_seqs, 1, 2**20)
        if self.max_num_batched_tokens is not None:
            _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**24)
        if self.max_resident_adapters is not None:
            _check_int("max_resident_adapters", self.max_resident_adapters, 1, 2**20)
        if self.kv_cache_memory is not None:
            parse_bytes("kv_cache_memory", self.kv_cache_memory)
        if self.adapter_host_memory is not None:
            parse_bytes("adapter_host_memory", self.adapter_host_memory)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "int8"))
        _check_choice("backend", self.backend, ("auto", "triton", "cpu", "reference"))
        _check_choice("cuda_graphs", self.cuda_graphs, ("auto", True, False))
        _check_choice("fallback", self.fallback, ("warn", "silent", "error"))
        for name in ("prefix_caching", "deterministic"):
            _check_choice(name, getattr(self, name), (True, False))
        if not isinstance(self.cache_salt, str):
            raise ConfigError(f"cache_salt={self.cache_salt!r}: must be a string")

    @classmethod
    def make(cls, config: PagedConfig | None, overrides: dict[str, Any]) -> PagedConfig:
        """`config` (or the defaults) with `overrides`; HF_PAGED_BACKEND replaces an "auto" backend.

        Raises:
            ConfigError: an override is not a field, or a value is not allowed.
        """
        if config is None:
            config = cls()
        elif not isinstance(config, cls):
            raise ConfigError(f"config={config!r}: must be a PagedConfig or None")
        names = {f.name for f in fields(cls)}
        for name in overrides:
            if name not in names:
                raise ConfigError(
                    f"{name}={overrides[name]!r}: not an option; options are {', '.join(sorted(names))}"
                )
        config = replace(config, **overrides)
        backend = os.environ.get("HF_PAGED_BACKEND")
        if backend and config.backend == "auto":
            config = replace(config, backend=backend)  # type: ignore[arg-type]
        return config

    @property
    def forbids_fallback(self) -> bool:
        """Whether a call that cannot be served natively raises: upstream's results depend on the batch."""
        return self.fallback == "error" or self.deterministic

    @property
    def fallback_rule(self) -> str:
        """Which option it is that forbids them."""
        return "deterministic=True" if self.deterministic else "fallback='error'"

    def budget_bytes(self) -> int | None:
        """`kv_cache_memory` in bytes, or None for the default budget of the device."""
        return None if self.kv_cache_memory is None else parse_bytes("kv_cache_memory", self.kv_cache_memory)

    def adapter_host_bytes(self) -> int | None:
        """`adapter_host_memory` in bytes, or None for the default of the device."""
        most = self.adapter_host_memory
        return None if most is None else parse_bytes("adapter_host_memory", most)


def parse_bytes(name: str, value: int | str) -> int:
    """A positive number of bytes from an int or a string such as "512MiB".

    Raises:
        ConfigError: not a number of bytes, or not positive.
    """
    hint = 'allowed: a positive int, or a string such as "512MiB", "2GiB", "1.5GB"'
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{name}={value!r}: {hint}")
    if isinstance(value, int):
        number: float = value
    else:
        text = value.strip().lower().replace("_", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(digits) :].strip()
        try:
            number = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            raise ConfigError(f"{name}={value!r}: {hint}") from None
    if not 0 < number < 2**63:
        raise ConfigError(f"{name}={value!r}: {hint}")
    return int(number)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: must be an int from {low} to {high}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
