"""How the CPU backend runs numba kernels beside torch: how many threads, one launch at a time, what a fork changes.

Three facts shape this file. Numba's OpenMP layer kills a forked child that enters it; its workqueue layer aborts
when two threads launch at once; and torch's thread count is the user's wish. So a forked child stays on one thread,
which needs no threading layer; parallel launches take turns; and each asks torch how many threads it may use, and
leaves numba's own number as it was.

Importing this file does not import numba.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
import threading
import warnings
from array import array
from collections.abc import Callable, Hashable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_paged.kernels.cpu_jit import Kernel

__all__ = [
    "cancel_deferral",
    "defer_loading",
    "float_bits",
    "in_forked_child",
    "is_loading",
    "kernel_module",
    "launch",
    "launch_packed",
    "load_in_background",
    "loaded_kernels",
    "num_bins",
    "wait_for_loading",
]

#: Below this many bytes a thread, starting it costs more than it saves.
_MIN_BYTES_PER_THREAD = 128 * 1024


class _Process:
    """What a forked child must not inherit."""

    def __init__(self) -> None:
        self.launch_lock = threading.Lock()
        self.forked = False
        self.threads_started = False  # those of numba

    def after_fork_in_child(self) -> None:
        # Another thread of the parent may have held the lock: in the child nobody would release it.
        self.launch_lock = threading.Lock()
        self.forked = True
        _loading.lock = threading.RLock()
        _loading.deferred.clear()
        _loading.threads.clear()  # a thread that began between `wait_for_loading` and the fork is not here


_process = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork_in_child)


def in_forked_child() -> bool:
    """Whether parallel kernels must not run here, because this process is a fork of one that may have run them."""
    return _process.forked


class _Loading:
    """Warm-ups that run in the background, by what they are for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal's handler may fork in a thread that holds it
        self.threads: dict[Hashable, threading.Thread] = {}
        self.finished: set[Hashable] = set()
        self.deferred: set[Hashable] = set()  # nobody has started them yet


_loading = _Loading()
if hasattr(os, "register_at_fork"):
    # A child forked in the middle of an import would wait for ever for the thread that holds the import's lock.
    os.register_at_fork(before=lambda: wait_for_loading())


def defer_loading(key: Hashable) -> None:
    """Makes `is_loading(key)` true until somebody calls `load_in_background`, if that has not happened yet."""
    with _loading.lock:
        if key not in _loading.finished and key not in _loading.threads and not _process.forked:
            _loading.deferred.add(key)


def cancel_deferral(key: Hashable) -> None:
    """Undoes `defer_loading`: the kernels for `key` load when they are next needed."""
    _loading.deferred.discard(key)


def load_in_background(key: Hashable, warm_up: Callable[[], None]) -> None:
    """Runs `warm_up`, which imports, compiles or loads the kernels for `key`, in a thread; once a process and key.

    Importing numba takes half a second and compiling for the first time several: until it is done
    `is_loading(key)` tells callers to take the paths that need no numba.
    """
    with _loading.lock:
        if key in _loading.threads or key in _loading.finished or _process.forked:
            return

        def run() -> None:
            try:
                warm_up()
            except (
                Exception
            ) as error:  # the call that needs the kernel will raise it where somebody can see it
                warnings.warn(f"loading CPU kernels failed: {error}", RuntimeWarning, stacklevel=1)
            finally:
                _loading.finished.add(key)
                _loading.threads.pop(key, None)

        thread = threading.Thread(target=run, name="hf_paged-load-kernels")
        _loading.threads[key] = thread
        _loading.deferred.discard(key)
        thread.start()


def is_loading(key: Hashable) -> bool:
    """Whether the kernels for `key` are yet to be loaded, or just being loaded by another thread."""
    thread = _loading.threads.get(key)
    if thread is None:
        return key in _loading.deferred
    return thread is not threading.current_thread()


def wait_for_loading() -> None:
    """Returns when nothing is being loaded."""
    me = threading.current_thread()
    while True:  # one may have started another
        with _loading.lock:  # under it whoever is listed has been started
            others = [thread for thread in list(_loading.threads.values()) if thread is not me]
        if not others:
            return
        for thread in others:
            thread.join()


@functools.cache
def kernel_module(name: str) -> ModuleType | None:
    """The module `hf_paged.kernels.<name>` of numba kernels; None, and one warning, where numba cannot be imported."""
    try:
        importlib.import_module("numba")
    except Exception as error:  # a numba that does not fit its numpy raises more than ImportError
        _warn_numba(f"{type(error).__name__}: {error}")
        return None
    return importlib.import_module(f"hf_paged.kernels.{name}")


def loaded_kernels(name: str, *dtypes: torch.dtype) -> Any | None:
    """The module `hf_paged.kernels.<name>`; None where kernels for one of `dtypes` are not to be had, or not yet."""
    if any(map(is_loading, dtypes)) or not all(map(_has_kernels, dtypes)):
        return None
    return kernel_module(name)


@functools.cache
def _has_kernels(dtype: torch.dtype) -> bool:
    module: Any = kernel_module("cpu_jit")
    return module is not None and module.dtype_tag(dtype) is not None


@functools.cache
def _warn_numba(reason: str) -> None:
    message = f"numba cannot be imported ({reason}): attention on the CPU uses slower paths of torch"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def num_bins(work_bytes: int) -> int:
    """Into how many parts, one a thread, to split work which reads and writes `work_bytes`."""
    if work_bytes < 2 * _MIN_BYTES_PER_THREAD or _process.forked:
        return 1
    return max(1, min(work_bytes // _MIN_BYTES_PER_THREAD, torch.get_num_threads(), _numba_threads()))


@functools.lru_cache(maxsize=256)
def float_bits(number: float) -> int:
    """What to pass for a float32 argument."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def launch(kernel: Kernel, bins: int, arguments: Iterable[int]) -> None:
    """Runs all `bins` parts of a kernel: on this thread where it is one, else in parallel, while no other launch does.

    Args:
        kernel: see `hf_paged.kernels.cpu_jit`. arguments: its arguments, ints of 64 bits.
    """
    packed = array("q", arguments)
    launch_packed(kernel, bins, packed.buffer_info()[0])


def launch_packed(kernel: Kernel, bins: int, address: int) -> None:
    """`launch` of arguments that lie at `address` already."""
    if bins == 1:
        kernel.run(0, 1, address)
    elif _process.forked:
        for index in range(bins):
            kernel.run(index, bins, address)
    else:
        _launch_parallel(kernel, bins, address)


def _launch_parallel(kernel: Kernel, bins: int, arguments: int) -> None:
    module: Any = kernel_module("cpu_bins")
    if _process.threads_started and bins == _numba_threads():
        # All threads: who has set numba to fewer has the same parts in turn, so there is nothing to ask or put back.
        with _process.launch_lock:
            module.run_bins(bins, kernel.address, arguments)
        return
    import numba

    with _process.launch_lock:
        # In this order: asking numba may start its threading layer.
        torch_before, before = torch.get_num_threads(), numba.get_num_threads()
        if before != bins:
            numba.set_num_threads(bins)
        try:
            module.run_bins(bins, kernel.address, arguments)
        finally:
            if before != bins:
                numba.set_num_threads(before)
            # Numba's OpenMP layer sets the thread count of the runtime it shares with torch when it starts.
            if torch.get_num_threads() != torch_before:
                torch.set_num_threads(torch_before)  # noqa: TID251 - puts the user's choice back
        _process.threads_started = True


@functools.cache
def _numba_threads() -> int:
    import numba

    return numba.config.NUMBA_NUM_THREADS
