"""The kernels compiled ahead of time for GPUs that need not be here, inside the budgets of triton_budgets.json.

Compiling runs in a process of its own: it must not see the interpreter, and a compiler that aborts ends only that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = json.loads(Path(__file__).with_name("triton_budgets.json").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: One of each kind for `make test`; everything is in `make test-full`.
QUICK = (
    "paged_decode/llama-32-8x128/bf16|paged_prefill/gpt2/bf16|store_kv_rope/llama-32-8x128/int8|sample/50257/plain|"
    "lora/768-2304/decode-bf16"
)


def compile_cases(target: str, only: str, cache_dir: Path) -> list[dict]:
    """One dict a kernel, as `hf_paged.kernels.triton_compile` prints them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hf_paged.kernels.triton_compile", "--target", target, "--only", only]
    environment |= {"TRITON_CACHE_DIR": str(cache_dir), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def over_budget(report: dict) -> list[str]:
    """What the report has beyond the budget of its target and kernel."""
    rules = [
        rule
        for rule in BUDGETS["kernels"]
        if rule["kernel"] == report["kernel"] and re.fullmatch(rule.get("case", ".*"), report["case"])
    ]
    name = f"{report['target']} {report['case']} {report['kernel']}"
    if not rules:
        return [f"{name}: no budget"]
    budget = rules[0]
    limits = {
        "registers": budget["registers"][report["target"]],
        "shared_bytes": budget["shared_bytes"][report["target"]],
    }
    limits["spill_bytes"] = budget.get("spill_bytes", BUDGETS["spill_bytes"])
    over = [f"{name}: {key} {report[key]} > {limit}" for key, limit in limits.items() if report[key] > limit]
    if report["matrix_instructions"] < budget.get("matrix_instructions", 0):
        over.append(f"{name}: no matrix instructions")
    if report["async_copies"] < budget.get("async_copies", 0):
        over.append(f"{name}: loads are not pipelined")
    return over


def test_a_sub_grid_for_hopper_is_inside_its_budgets(tmp_path):
    reports = compile_cases("sm_90", QUICK, tmp_path)
    assert {report["case"] for report in reports} == set(QUICK.split("|"))
    assert [line for report in reports for line in over_budget(report)] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_case_is_inside_its_budgets(target, tmp_path):
    reports = compile_cases(target, ".*", tmp_path)
    assert [line for report in reports for line in over_budget(report)] == []
    ops = {report["case"].split("/")[0] for report in reports}
    assert ops == {
        *("paged_decode", "paged_prefill", "store_kv", "store_kv_rope", "copy_blocks", "lora"),
        *("rms_norm", "layer_norm", "silu_mul", "gelu", "sample", "seeded_uniform"),
    }


def test_budgets_catch_what_they_are_for():
    report = {"target": "sm_90", "case": "paged_decode/gpt2/bf16", "kernel": "paged_decode_kernel"}
    fine = {
        "registers": 78,
        "spill_bytes": 0,
        "shared_bytes": 20736,
        "matrix_instructions": 16,
        "async_copies": 35,
    }
    assert over_budget(report | fine) == []
    for change in ({"registers": 255}, {"spill_bytes": 8}, {"shared_bytes": 300_000}, {"async_copies": 0}):
        assert len(over_budget(report | fine | change)) == 1, change
    assert over_budget(report | fine | {"kernel": "unknown"}) == [
        "sm_90 paged_decode/gpt2/bf16 unknown: no budget"
    ]


def test_the_compiler_refuses_the_interpreter_and_unknown_cases():
    for environment, only, message in (
        ("1", ".*", "TRITON_INTERPRET"),
        ("0", "nothing", "no case matches 'nothing'"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "hf_paged.kernels.triton_compile", "--only", only],
            **{
                "cwd": ROOT,
                "env": os.environ | {"TRITON_INTERPRET": environment},
                "capture_output": True,
                "text": True,
            },
        )
        assert run.returncode == 2
        assert message in run.stderr
