"""Numba beside torch: threads, forks, caches that cannot be written, numba that cannot be imported."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numba
import pytest
import torch

from hf_paged.kernels import cpu_backend, cpu_runtime
from tests.kernels.paged_case import make_case

ROOT = Path(__file__).parents[2]
BIG = [(1, 3000), (1, 2000), (1, 10)]


def run_python(code: str, folder: Path = ROOT, **environment: str | None) -> str:
    """What a fresh interpreter prints, started in `folder`; environment variables given as None are taken away."""
    merged = {**os.environ, "PYTHONPATH": str(folder), **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=merged, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_waiting_for_a_thread_that_is_just_being_started(monkeypatch):
    listed, start = threading.Event(), threading.Thread.start

    def start_late(self: threading.Thread) -> None:
        if self.name == "hf_paged-load-kernels":
            listed.set()
            threading.Event().wait(0.2)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    ran = threading.Event()
    loader = threading.Thread(target=cpu_runtime.load_in_background, args=("a test", ran.set))
    start(loader)
    try:
        assert listed.wait(10)
        cpu_runtime.wait_for_loading()
        assert ran.is_set()
    finally:
        loader.join()
        cpu_runtime._loading.finished.discard("a test")


def test_two_threads_launch_at_once(monkeypatch):
    monkeypatch.setattr(cpu_backend, "num_bins", lambda work_bytes: cpu_runtime._numba_threads())
    cases = [make_case(BIG, seed=seed) for seed in range(2)]
    expected = [case.truth() for case in cases]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(30):
                torch.testing.assert_close(
                    cases[index].run("cpu").double(), expected[index], atol=1e-5, rtol=0
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_workqueue_layer_survives_two_threads():
    code = """
        import threading, torch
        from tests.kernels.paged_case import make_case
        cases = [make_case([(1, 3000), (1, 2000)], seed=seed) for seed in range(2)]
        def work(case):
            for _ in range(30):
                case.run("cpu")
        threads = [threading.Thread(target=work, args=(case,)) for case in cases]
        [t.start() for t in threads], [t.join() for t in threads]
        import numba
        print(numba.threading_layer())
    """
    assert run_python(code, NUMBA_THREADING_LAYER="workqueue", OMP_NUM_THREADS="2").strip() == "workqueue"


def test_torchs_thread_count_is_obeyed_and_numbas_left_alone(monkeypatch):
    seen: list[tuple[int, int]] = []
    module = cpu_runtime.kernel_module("cpu_bins")
    run_bins = module.run_bins

    def spy(bins, *arguments):
        seen.append((bins, numba.get_num_threads()))
        run_bins(bins, *arguments)

    monkeypatch.setattr(module, "run_bins", spy)
    monkeypatch.setattr(cpu_runtime, "_numba_threads", lambda: 2)
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba was started with one thread")
    before = numba.get_num_threads()
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        make_case(BIG).run("cpu")
        assert numba.get_num_threads() == before
    assert seen == [(2, 2), (2, 2)]  # one thread needs no parallel loop


def test_starting_numbas_threads_leaves_torchs_thread_count():
    code = """
        import torch
        torch.set_num_threads(1)
        from tests.kernels.paged_case import make_case
        make_case([(1, 3000)]).run("cpu")
        print(torch.get_num_threads())
    """
    assert run_python(code, OMP_NUM_THREADS=None, NUMBA_NUM_THREADS="2").strip() == "1"


def test_small_work_stays_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(cpu_runtime, "_numba_threads", lambda: 64)
    assert cpu_runtime.num_bins(1000) == 1
    assert cpu_runtime.num_bins(300_000) == 2
    assert cpu_runtime.num_bins(10**9) == 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("lock_held", [False, True])
def test_a_forked_child_answers_without_threads(lock_held):
    code = f"""
        import os, signal, torch
        from hf_paged.kernels import cpu_runtime
        from hf_paged.kernels.cpu_argmax import argmax_rows
        from tests.kernels.paged_case import make_case
        torch.set_num_threads(1)  # torch's own pool does not survive a fork either
        case = make_case([(1, 3000), (1, 2000), (3, 9), (40, 50)], group=2)
        expected = case.truth()
        cpu_runtime.num_bins = lambda work: 2
        case.run("cpu")
        if {lock_held}:
            cpu_runtime._process.launch_lock.acquire()
        child = os.fork()
        if child == 0:
            signal.alarm(250)
            torch.testing.assert_close(case.run("cpu").double(), expected, atol=1e-5, rtol=0)
            logits = torch.randn(50, 9000)
            assert torch.equal(argmax_rows(logits), logits.argmax(-1))
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    assert run_python(code).strip() == "0"


def test_nothing_can_be_cached(tmp_path):
    """A read-only installation and no home: kernels are compiled in memory."""
    copy = tmp_path / "installed"
    shutil.copytree(
        ROOT / "kernels", copy / "hf_paged" / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "hf_paged" / "__init__.py").write_text("")
    # A file where the cache folder would be: even root cannot make a folder there.
    (copy / "hf_paged" / "kernels" / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.write_text("")
    code = """
        import torch
        from hf_paged.kernels import cpu_argmax, cpu_argmax_kernel
        logits = torch.randn(3, 70)
        print(torch.equal(cpu_argmax.argmax_rows(logits), logits.argmax(-1)), cpu_argmax_kernel.__file__)
        print(type(cpu_argmax_kernel.argmax_part(torch.float32).run._cache).__name__)
    """
    places = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "NUMBA_CACHE_DIR": None,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    output = run_python(code, copy, **places)
    assert output.startswith(f"True {copy}")
    assert "NullCache" in output


def test_a_damaged_or_full_cache_costs_a_compilation_only(tmp_path):
    code = """
        import torch
        from hf_paged.kernels import cpu_argmax, cpu_argmax_kernel
        logits = torch.randn(3, 70)
        print(torch.equal(cpu_argmax.argmax_rows(logits), logits.argmax(-1)))
        print(sum(cpu_argmax_kernel.argmax_part(torch.float32).run.stats.cache_hits.values()))
    """

    def cached():
        return run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split()

    assert cached() == ["True", "0"]
    assert cached() == ["True", "1"]
    for path in tmp_path.rglob("*.nbc"):
        path.write_bytes(path.read_bytes()[:100])
    assert cached() == ["True", "0"]
    for path in tmp_path.rglob("*.nbi"):
        path.write_bytes(b"\x80")
    assert cached() == ["True", "0"]


def test_numba_that_cannot_be_imported(monkeypatch):
    import_module = cpu_runtime.importlib.import_module

    def fail(name):
        if name == "numba":
            raise SystemError("numba does not fit this numpy")
        return import_module(name)

    monkeypatch.setattr(cpu_runtime.importlib, "import_module", fail)
    caches = (cpu_runtime.kernel_module, cpu_runtime._warn_numba, cpu_runtime._has_kernels)
    for cache in caches:
        cache.cache_clear()
    try:
        case = make_case([(1, 30), (40, 40)], group=2)
        expected = case.truth()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.testing.assert_close(case.run("cpu").double(), expected, atol=1e-5, rtol=0)
        assert [str(w.message) for w in caught if "numba" in str(w.message)] == [
            "numba cannot be imported (SystemError: numba does not fit this numpy): attention on the CPU uses slower "
            "paths of torch"
        ]
    finally:
        for cache in caches:
            cache.cache_clear()


def test_no_kernel_goes_on_with_the_address_of_its_own_array():
    """Numba frees an array after the last line that names it, whoever has its address: callers own all memory."""
    for path in sorted((ROOT / "kernels").glob("cpu_*.py")):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or not _is_compiled(function):
                continue
            names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            assert "ctypes" not in names, f"{path.name}: {function.name}"


def _is_compiled(function: ast.FunctionDef) -> bool:
    return any("helper" in ast.unparse(d) or "entry" in ast.unparse(d) for d in function.decorator_list)
