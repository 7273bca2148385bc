"""What an engine needs to run steps for one shape of model: pool, block manager, scheduler, sampler, runner."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_paged.config import PagedConfig
from hf_paged.engine.ahead import make_ahead
from hf_paged.engine.block_manager import BlockManager
from hf_paged.engine.graphs import make_graphs
from hf_paged.engine.kv_cache import KVCache, LayerSpec
from hf_paged.engine.memory import default_kv_budget
from hf_paged.engine.model_runner import ModelRunner
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.scheduler import Scheduler
from hf_paged.errors import ConfigError
from hf_paged.kernels.ops import resolve_backend

#: Tokens a step may have when the config leaves it open: enough rows to keep the matrix products busy, few
#: enough that a long prompt does not hold up running sequences for long.
_DEFAULT_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}
#: The pool may hold this much beyond twice its peak use before cached prefixes are evicted.
_SLACK_BYTES = 48 * 2**20
#: On a GPU it may hold this part of its budget.
_DEVICE_SLACK = 4


class Runtime:
    """Built for a `geometry` (one entry a KV layer) and thrown away when that changes.

    Raises:
        ConfigError: `kv_cache_memory` does not hold a single block, or `deterministic` is not to be had here.
    """

    def __init__(self, geometry: tuple, config: PagedConfig) -> None:
        self.geometry = geometry
        self.device: torch.device = geometry[0].device
        self.backend = resolve_backend(self.device, config.backend)
        if config.deterministic:
            check_deterministic(self.device, config.backend)
        in_int8 = config.kv_cache_dtype == "int8"
        specs = [
            LayerSpec(g.num_kv_heads, g.head_dim, torch.int8 if in_int8 else g.dtype, g.device)
            for g in geometry
        ]
        budget = config.budget_bytes() or default_kv_budget(self.device)
        self.cache = KVCache(specs, config.block_size, budget)
        if self.cache.max_blocks < 1:
            raise ConfigError(
                f"kv_cache_memory={config.kv_cache_memory!r}: one block of {config.block_size} tokens takes "
                f"{self.cache.bytes_per_block} bytes"
            )
        slack = _SLACK_BYTES // self.cache.bytes_per_block
        if self.device.type != "cpu":
            # There a pool that shrinks is copied, and what is captured of it is lost.
            slack = max(slack, self.cache.max_blocks // _DEVICE_SLACK)
        self.manager = BlockManager(
            config.block_size,
            self.cache.max_blocks,
            self.cache.grow,
            prefix_caching=config.prefix_caching,
            slack_blocks=slack,
        )
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens
            or _DEFAULT_BATCHED_TOKENS.get(self.device.type, 2048),
        )
        self.sampler = Sampler(_argmax_for(self.device, self.backend), apart=config.deterministic)
        self.runner = ModelRunner(self.device)
        self.graphs = make_graphs(config, self.device, self.backend, self.cache)
        self.ahead = make_ahead(self.backend, len({g.device for g in geometry}))
        # Those of the model's own dtype are for its activations and logits too.
        dtypes = {g.dtype for g in geometry} | {spec.dtype for spec in specs}
        self._cpu_kernels = _CpuKernels(dtypes) if self.backend == "cpu" else None
        if config.deterministic and self._cpu_kernels is not None:
            self._cpu_kernels.load_now()  # torch's paths until then would give other bits

    def look_again(self) -> None:
        """Weights may lie elsewhere than at the last step: a call came, or they changed under one."""
        if self.graphs is not None:
            self.graphs.look_again()

    def stepped(self) -> None:
        """After each step: a call that has run for a while is worth loading faster kernels beside it."""
        if self._cpu_kernels is not None:
            self._cpu_kernels.stepped()

    def went_idle(self) -> None:
        """Nothing is left to run."""
        if self.ahead is not None:
            self.ahead.finish()
        self.trim()
        if self.graphs is not None:
            self.graphs.went_idle()
        self.manager.max_blocks = self.cache.max_blocks  # memory that was refused may be there next time
        if self._cpu_kernels is not None:
            self._cpu_kernels.load()

    @property
    def capacity_tokens(self) -> int:
        """Most tokens one sequence can hold."""
        return self.manager.max_blocks * self.manager.block_size

    def trim(self) -> None:
        """Gives back what lies beyond the last block that is used or cached, once it is worth the page faults later."""
        if self.manager.num_free > self.manager.slack_blocks:
            self.cache.shrink(self.manager.trim())

    def close(self) -> None:
        """Gives all KV memory back; no thread is left."""
        if self.ahead is not None:
            self.ahead.finish()
        if self.graphs is not None:
            self.graphs.drop()
        self.cache.close()
        if self._cpu_kernels is not None:
            self._cpu_kernels.close()


class _CpuKernels:
    """When numba's kernels are loaded: not in the first moments of a process's first call, which a short call
    would wait for.

    Importing numba holds the interpreter's lock for half a second; until it is done steps run on torch's SDPA.
    """

    _PATIENCE_S = 0.3

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        from hf_paged.kernels import cpu_backend, cpu_runtime

        self._backend, self._runtime, self._dtypes = cpu_backend, cpu_runtime, dtypes
        self._first_step: float | None = None
        self._requested = False
        for dtype in dtypes:
            cpu_runtime.defer_loading(dtype)

    def stepped(self) -> None:
        if self._requested:
            return
        now = time.perf_counter()
        self._first_step = self._first_step or now
        if now - self._first_step > self._PATIENCE_S:
            self.load()

    def load(self) -> None:
        self._requested = True
        for dtype in self._dtypes:
            self._backend.load_kernels(dtype)

    def load_now(self) -> None:
        self.load()
        self._runtime.wait_for_loading()

    def close(self) -> None:
        for dtype in self._dtypes:
            self._runtime.cancel_deferral(dtype)
        self._runtime.wait_for_loading()


def check_deterministic(device: torch.device, backend: str) -> None:
    """Raises ConfigError where `deterministic=True` cannot be kept: it needs the kernels of the CPU backend."""
    if device.type != "cpu":
        raise ConfigError(f"deterministic=True: weights on {device}; only the CPU is supported so far")
    resolved = resolve_backend(device, backend)
    if resolved != "cpu":
        raise ConfigError(f"deterministic=True: needs backend='cpu', which has numba, not {resolved!r}")
    from hf_paged.kernels.cpu_row_linear import missing

    if (text := missing()) is not None:
        raise ConfigError(f"deterministic=True: {text}")


def _argmax_for(device: torch.device, backend: str) -> Callable[[Tensor], Tensor]:
    if device.type == "cpu" and backend == "cpu":
        from hf_paged.kernels.cpu_argmax import argmax_rows

        return argmax_rows
    return lambda logits: torch.argmax(logits, dim=-1)
