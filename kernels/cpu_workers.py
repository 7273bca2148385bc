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
from collections.abc import Callable

import torch  # noqa: F401 - brings the library that is looked for

from hf_paged.kernels.cpu_runtime import in_forked_child

__all__ = ["let_workers_go"]

#: `omp_pause_soft`: the runtime goes on where it was when it is next used.
_SOFT = 1


def let_workers_go() -> None:
    """Ends the idle OpenMP workers of the calling thread, if it has any. Thread counts stay what they are."""
    if in_forked_child():
        return  # the fork did not copy them: the runtime would wait for ever for their end
    for pause in _pauses():
        pause(_SOFT)  # inside of a parallel region it does nothing


@functools.cache
def _pauses() -> tuple[Callable[[int], int], ...]:
    """`omp_pause_resource_all` of each GNU OpenMP runtime in this process; none where there is no such runtime."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:  # not Linux
        return ()
    found = []
    for path in sorted(paths):
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        pause = getattr(library, "omp_pause_resource_all", None)  # since GCC 9
        if pause is not None:
            found.append(pause)
    return tuple(found)
