"""`python -m benchmarks.gpu` without a GPU: every suite starts, measures tiny shapes and writes a well-formed file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, results, shapes, vllm_protocol
from hf_paged.comparison.workloads import Request

#: What the rows of each suite must tell, by the beginning of their name.
FIGURES = {
    "kernels": {
        "ceiling copy": {"gb_per_s"},
        "ceiling matrix": {"tflop_per_s"},
        "decode": {"us", "gb_per_s", "percent_of_copy"},
        "prefill": {"tflop_per_s", "math_tflop_per_s", "flex_tflop_per_s", "percent_of_best_sdpa"},
        "chunk": {"tflop_per_s"},
        "rms_norm": {"gb_per_s", "torch_us"},
        "sample": {"us", "top_k_top_p_us", "torch_sort_us"},
    },
    "step": {
        "step": {
            "ms",
            "floor_ms",
            "percent_of_roofline",
            "forward_ms",
            "percent_beside_forward",
            "percent_idle",
            "steps_ahead",
        }
    },
    "offline": {
        "offline llama-tiny hf_paged, greedy": {"output_tokens_per_s"},
        "offline llama-tiny hf_paged, vLLM's protocol": {"tokens_per_s"},
        "offline llama-tiny generate, vLLM's protocol": {"tokens_per_s", "hf_paged_times_this"},
        "offline llama-tiny generate, sorted": {"output_tokens_per_s", "hf_paged_times_this"},
        "offline llama-tiny generate_batch": {"output_tokens_per_s", "hf_paged_times_this"},
    },
    "adapters": {"adapters llama-tiny": {"tokens_per_s"}},
}


def run(path: Path, suite: str, *more: str) -> list[dict[str, Any]]:
    """The rows of one tiny run in this process."""
    assert command.main(["--suite", suite, "--tiny", "--json", str(path), *more]) == 0
    data = json.loads(path.read_text())
    assert data["schema_version"] == results.SCHEMA_VERSION
    last = data["runs"][-1]
    assert last["suite"] == suite
    assert last["environment"]["packages"]["torch"] == torch.__version__
    return last["rows"]


def check(rows: list[dict[str, Any]], suite: str) -> None:
    for beginning, figures in FIGURES[suite].items():
        found = [row for row in rows if row["name"].startswith(beginning)]
        assert found, f"no row {beginning!r}"
        for row in found:
            assert figures <= set(row), row
            assert all(row[name] > 0 for name in figures - {"percent_beside_forward"}), row


def test_decode_rows_are_appended_after_what_the_file_has(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "deeper" / "gpu.json"
    first = run(path, "kernels", "--only", "decode tiny 4/2x16 batch")
    assert [row["name"] for row in first[:2]] == ["ceiling copy", "ceiling matrix bf16"]
    assert first[2]["kv_gb"] == pytest.approx(2 * 2 * 40 * 2 * 16 * 4 / 1e9)  # K and V of 2 rows of 40
    run(path, "kernels", "--only", "rms_norm")
    assert len(json.loads(path.read_text())["runs"]) == 2
    assert "percent_of_copy" in capsys.readouterr().out


def test_a_run_stops_by_itself_and_keeps_its_rows(tmp_path: Path, capsys: Any) -> None:
    rows = run(tmp_path / "gpu.json", "step", "--budget-s", "2")
    assert [row["name"] for row in rows] == ["ceiling copy", "ceiling matrix bf16"]
    assert "2 rows not run within 2 s: step llama-tiny batch 2" in capsys.readouterr().out


def test_a_row_that_fails_is_kept_and_the_rest_still_runs(tmp_path: Path) -> None:
    file = results.ResultFile(tmp_path / "gpu.json", "kernels", {})
    run = bench.Bench(torch.device("cpu"), file, 100, tiny=True)

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of something\nand more")

    run.run([bench.Case("a", fail), bench.Case("b", lambda: {"us": 1.0})])
    assert file.rows == [{"name": "a", "error": "RuntimeError: out of something"}, {"name": "b", "us": 1.0}]
    assert run.failed == 1
    assert "FAILED" in results.line(file.rows[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--suite"),
        (["--suite", "speed"], "invalid choice: 'speed'"),
        (["--suite", "step", "--budget-s", "0"], "--budget-s 0.0: must be above 0"),
        (["--suite", "step", "--tiny"], "name a file for them with --json"),
        (["--suite", "step"], "no CUDA device here"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], message: str, capsys: Any) -> None:
    if "no CUDA" in message and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("[1, 2]")
    assert command.main(["--suite", "kernels", "--tiny", "--json", str(path)]) == 2
    assert f"{path}: not a results file" in capsys.readouterr().err
    assert path.read_text() == "[1, 2]"


def test_the_file_is_named_after_the_gpu_and_the_day() -> None:
    import datetime

    path = results.default_path(Path("/r"), "NVIDIA H200", datetime.date(2026, 1, 31))
    assert path == Path("/r/benchmarks/results/nvidia-h200-2026-01-31.json")


def test_packing_is_vllms() -> None:
    requests = [
        Request((1,) * prompt, new) for prompt, new in [(10, 20), (900, 5), (5, 1148), (5, 1149), (1, 1)]
    ]
    # 900 + 1148 = 2048 still fits, one more token does not.
    assert [unit.indices for unit in vllm_protocol.pack(requests, 8)] == [(0, 1, 2), (3, 4)]
    assert [unit.indices for unit in vllm_protocol.pack(requests, 2)] == [(0, 1), (2, 3), (4,)]
    assert vllm_protocol.credited(requests) == 10 + 20 + 905 + 1153 + 1154 + 2


def test_bytes_a_step_reads_leave_out_what_is_looked_up() -> None:
    llama, gpt2 = (shapes.build(shape, torch.device("cpu"), torch.float32) for shape in shapes.TINY_MODELS)
    table = 4 * llama.model.embed_tokens.weight.numel()
    assert shapes.read_bytes(llama) == 4 * llama.num_parameters() - table  # untied: the output is read whole
    positions = 4 * gpt2.transformer.wpe.weight.numel()
    assert shapes.read_bytes(gpt2) == 4 * gpt2.num_parameters() - positions
    assert shapes.kv_bytes_per_token(llama) == 4 * 2 * 16  # one layer, one KV head of 16, K and V in float32


@pytest.mark.slow
@pytest.mark.parametrize("suite", command.SUITES)
def test_every_suite_runs_from_an_uninstalled_checkout(tmp_path: Path, suite: str) -> None:
    path = tmp_path / "gpu.json"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--suite", suite, "--tiny", "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(json.loads(path.read_text())["runs"][-1]["rows"], suite)
    assert time.perf_counter() - started < 280
