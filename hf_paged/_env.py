"""What hf_paged runs on, as one plain dict: for `hf-paged env`, bug reports and headers of measurements."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

import hf_paged
from hf_paged.engine.memory import available_bytes, default_kv_budget

__all__ = ["environment"]

_PACKAGES = (
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "numba",
    "llvmlite",
    "triton",
    "kernels",
    "bitsandbytes",
    "torchao",
    "torchvision",  # listed because a build for another torch breaks imports of transformers
)

#: The only environment variables hf_paged reads.
_SETTINGS = ("HF_PAGED_DISABLE", "HF_PAGED_BACKEND", "HF_PAGED_VERBOSITY")

#: Other people's variables that change speed or results, reported when set.
_OTHER_SETTINGS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)

#: CPU flags that decide how fast a step can be, where /proc/cpuinfo names them (x86).
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def environment() -> dict[str, Any]:
    """Describe versions, CPU, memory, GPUs and backends of this process; allocates nothing on a device.

    Returns:
        JSON-ready values under `python`, `platform`, `packages` (name -> version, None where not installed),
        `settings`, `cpu`, `memory` (bytes), `gpus` and `backends` (name -> "available", or why not).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"hf-paged": hf_paged.__version__} | {name: _version(name) for name in _PACKAGES},
        "settings": {name: os.environ[name] for name in _SETTINGS + _OTHER_SETTINGS if name in os.environ},
        "cpu": _cpu(),
        "memory": _memory(),
        "gpus": _gpus(),
        "backends": _backends(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    fields: dict[str, str] = {}
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        # The first processor stands for all: where cores are mixed, their flags are still the same.
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "usable_cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _usable_cores() -> int:
    # os.cpu_count() counts the machine; a container or taskset may leave this process less.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> dict[str, int]:
    return {
        "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_bytes("cpu"),
        "default_kv_budget_bytes": default_kv_budget("cpu"),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return gpus


def _backends() -> dict[str, str]:
    cpu = "available" if _is_installed("numba") else "numba is not installed"
    if not torch.cuda.is_available():
        triton = "no CUDA device"
    else:
        triton = "available" if _is_installed("triton") else "triton is not installed"
    return {"reference": "available", "cpu": cpu, "triton": triton}


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
