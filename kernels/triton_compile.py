"""Compile the kernels ahead of time, for GPUs that are not here, and report what each would use.

    python -m hf_paged.kernels.triton_compile --target sm_90 --only 'paged_decode/.*/bf16'

prints one JSON object a line: case, kernel, registers, spilled bytes, shared memory, matrix and copy instructions.
A case calls an op's own Python function on tensors without storage while launches are recorded, so what is compiled
has the constants, tiles and alignment of a real call. A compiler that aborts takes its process along: run this in one
of its own. Needs no GPU, and not `TRITON_INTERPRET`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_paged.kernels.triton_compile_cases import CASES
from hf_paged.kernels.triton_launch import Gpu, recording

__all__ = ["TARGETS", "Launch", "Report", "compile_launch", "record", "report"]

#: Name -> (what Triton calls it, what the tables of this package see).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Gpu("sm_80", num_sms=108, has_fp8=False)),
    "sm_90": (GPUTarget("cuda", 90, 32), Gpu("sm_90", num_sms=132, has_fp8=True)),
    "sm_100": (GPUTarget("cuda", 100, 32), Gpu("sm_100", num_sms=148, has_fp8=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Gpu("gfx942", num_sms=304, has_fp8=True)),
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses. `registers` counts those of a thread; on AMD vector and accumulation ones."""

    case: str
    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    matrix_instructions: int
    async_copies: int


def record(case: str, target: str) -> list[Launch]:
    """The launches of one case as they would be made on `target`."""
    launches: list[Launch] = []
    with recording(lambda *launch: launches.append(Launch(*launch)), TARGETS[target][1]):
        CASES[case]()
    return launches


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel, specialised on the launch's arguments as a real call specialises."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        kind, aligned = _specialise(value, launch.kernel.params[index].do_not_specialize)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    missing = [name for name in names if name not in signature]
    if missing or len(signature) != len(names):
        raise TypeError(f"{launch.kernel.__name__}: recorded launch without {missing}")
    ordered = {name: signature[name] for name in names}
    source = ASTSource(launch.kernel, ordered, constants, attributes)
    return triton.compile(source, target=TARGETS[target][0], options=launch.options)


def _specialise(value: Any, plain: bool) -> tuple[str, bool]:
    """(type in the signature, whether it is a multiple of 16) as Triton's launcher sees an argument."""
    if value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not plain:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not plain


def report(case: str, target: str) -> Iterator[Report]:
    """Compiles every launch of a case and reports each."""
    for launch in record(case, target):
        compiled = compile_launch(launch, target)
        if target.startswith("gfx"):
            text = compiled.asm["amdgcn"]
            registers = _amd_number("vgpr_count", text)
            # Scalar registers spill into lanes of vector registers, not into memory.
            spills = 4 * _amd_number("vgpr_spill_count", text)
            matrix, copies = text.count("v_mfma"), text.count("buffer_load") + text.count("global_load")
        else:
            registers, spills = _nvidia_usage(compiled.asm["cubin"])
            text = compiled.asm["ptx"]
            matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", text))
            copies = text.count("cp.async.c")
        yield Report(
            case=case,
            kernel=launch.kernel.__name__,
            target=target,
            registers=registers,
            spill_bytes=spills,
            shared_bytes=compiled.metadata.shared,
            num_warps=launch.options["num_warps"],
            matrix_instructions=matrix,
            async_copies=copies,
        )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) by the cuobjdump in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_number(name: str, text: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"no .{name} in the compiled text")
    return int(found.group(1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels for a GPU that need not be here."
    )
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--only", default=".*", help="regular expression on the names of the cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    cases = [case for case in CASES if re.fullmatch(options.only, case)]
    if not cases:
        parser.error(f"no case matches {options.only!r}")
    for case in cases:
        if options.list:
            print(case)
            continue
        if "fp8" in case and not TARGETS[options.target][1].has_fp8:
            continue
        for result in report(case, options.target):
            print(json.dumps(dataclasses.asdict(result)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
