"""How much memory a KV cache may take: what this process can still get, not what the machine has.

On a CPU the least of several numbers counts: memory the kernel calls available, room below the memory limit of the
process's cgroup and of each cgroup above it, and room below the address-space and data limits of `ulimit`. On CUDA
it is what the driver calls free, plus what torch holds and does not use. Knows no model and no cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_paged.config import parse_bytes

__all__ = ["available_bytes", "default_kv_budget", "parse_bytes"]

#: The share of available memory that a cache may take when the user set no `kv_cache_memory`.
_DEFAULT_SHARE = 0.5

#: Files with the limit and the usage of a memory cgroup, and the key in its memory.stat of what can be reclaimed.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def default_kv_budget(device: torch.device | str) -> int:
    """Bytes a KV cache on `device` may grow to by default: half of what is available at this moment."""
    return int(available_bytes(device) * _DEFAULT_SHARE)


def available_bytes(device: torch.device | str) -> int:
    """Bytes this process could allocate on `device` at this moment; 0 if a limit is already passed."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return max(0, min(host_limits()))


def host_limits(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left below each limit on this process's host memory that could be read; never empty."""
    limits = [_physical_bytes(proc)]
    limits += [*_commit_headroom(proc), *_cgroup_headroom(proc, cgroup_root), *_rlimit_headroom(proc)]
    return limits


def _physical_bytes(proc: Path) -> int:
    available = _fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        return available
    name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def _commit_headroom(proc: Path) -> Iterator[int]:
    # Only in mode 2 does the kernel charge memory when it is reserved and not when it is touched.
    if _read_int(proc / "sys/vm/overcommit_memory") != 2:
        return
    fields = _fields(proc / "meminfo")
    if "CommitLimit" in fields and "Committed_AS" in fields:
        yield fields["CommitLimit"] - fields["Committed_AS"]


def _cgroup_headroom(proc: Path, root: Path) -> Iterator[int]:
    for line in _lines(proc / "self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base, names = root, _CGROUP_V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _CGROUP_V1
        else:
            continue
        # In a container the path may be the host's, of which only the root is mounted: missing files are skipped.
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            yield from _group_headroom(directory, *names)


def _group_headroom(directory: Path, limit_name: str, usage_name: str, reclaimable: str) -> Iterator[int]:
    limit, usage = _read_int(directory / limit_name), _read_int(directory / usage_name)
    if limit is None or usage is None:
        return
    stat = dict(line.split()[:2] for line in _lines(directory / "memory.stat") if len(line.split()) >= 2)
    # Cold file pages count as usage but are dropped before anything is refused.
    yield limit - usage + int(stat.get(reclaimable, 0))


def _rlimit_headroom(proc: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:
        return
    status = _fields(proc / "self/status")
    for limit_id, used_name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _hard = resource.getrlimit(limit_id)
        if soft != resource.RLIM_INFINITY:
            yield soft - status.get(used_name, 0)


def _fields(path: Path) -> dict[str, int]:
    """ "Name:  123 kB" lines as bytes."""
    fields = {}
    for line in _lines(path):
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    """The number in a one-line file; None where there is none ("max", no such file)."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None
