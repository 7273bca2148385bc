"""Giving back the OpenMP workers of a thread that is about to wait for another one.

GNU's OpenMP keeps a team of workers for each thread that ever ran a parallel loop. Between two loops workers spin for
the next one, but as soon as the process has more of them than processors they sleep at once instead, and each loop
begins with waking them: 60 µs for a product that takes 8. The team of a caller that loaded a model and now waits for
the engine's thread is enough for that. So whoever hands its work to that thread lets its own workers go; the next
parallel loop makes new ones.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch  # noqa: F401 - brings the library that is looked for

from hf_paged.kernels.cpu_runtime import in_forked_child

__all__ = ["let_workers_go"]

#: `omp_pause_soft`: the runtime goes on where it was when it is next used.
_SOFT = 1


def let_workers_go() -> None:
    """Ends the idle OpenMP workers of the calling thread, if it has any. Thread counts stay what they are."""
    if in_forked_child() or _has_lost_them():
        return  # the fork did not copy them: the runtime would wait for ever for their end
    for pause in _pauses():
        pause(_SOFT)  # inside of a parallel region it does nothing


def _has_lost_them() -> bool:
    """Whether this thread may have gone through a fork before this module was there to see it.

    Only the main thread can have. Its workers are threads that Python knows nothing of.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        return _is_copy_of_parent() or len(os.listdir("/proc/self/task")) <= threading.active_count()
    except OSError:
        return True


@functools.cache
def _is_copy_of_parent() -> bool:
    """Whether this process was forked by its parent and ran no program since: programs begin with random bytes at a
    random address, which the kernel shows. True as well where that cannot be seen of itself."""
    try:
        own = Path("/proc/self/auxv").read_bytes()
    except OSError:
        return True
    try:
        return Path(f"/proc/{os.getppid()}/auxv").read_bytes() == own
    except OSError:  # it is gone, or somebody else's
        return False


@functools.cache
def _pauses() -> tuple[Callable[[int], int], ...]:
    """`omp_pause_resource_all` of each GNU OpenMP runtime in this process; none where there is no such runtime."""
    try:
        with open("/proc/self/maps") as maps:
            lines = [line.split(maxsplit=5) for line in maps if "libgomp" in line]
    except OSError:  # not Linux
        return ()
    found = []
    paths = {parts[5].strip() for parts in lines if len(parts) == 6}
    for path in sorted(path for path in paths if os.path.basename(path).startswith("libgomp")):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:  # replaced on disk since it was loaded
            continue
        pause = getattr(library, "omp_pause_resource_all", None)  # since GCC 9
        if pause is not None:
            found.append(pause)
    return tuple(found)
