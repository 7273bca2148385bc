"""Workers of OpenMP go with the thread's work to another thread, and come back with its next parallel loop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import hf_paged
from hf_paged.kernels.cpu_runtime import wait_for_loading
from hf_paged.kernels.cpu_workers import _pauses, let_workers_go
from tests.helpers import ROOT, make_model

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not _pauses(), reason="torch is built with another OpenMP than GNU's"
)


def thread_ids() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def are_gone(threads: set[str]) -> bool:
    """Ended threads have been waited for, but the system may list them a moment longer."""
    for _ in range(500):
        if not threads & thread_ids():
            return True
        threading.Event().wait(0.02)
    return False


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # noqa: TID251 - a worker beside this thread, however many processors there are
    yield
    torch.set_num_threads(before)  # noqa: TID251


def work() -> torch.Tensor:
    return torch.ones(1 << 20).mul_(2.0)


def new_workers() -> set[str]:
    """The workers that this thread gets for a parallel loop."""
    let_workers_go()
    before = thread_ids()
    work()
    return thread_ids() - before


def test_workers_end_and_are_made_again(two_threads: None) -> None:
    workers = new_workers()
    assert len(workers) == 1
    let_workers_go()
    assert are_gone(workers)
    assert torch.get_num_threads() == 2
    before = thread_ids()
    assert bool((work() == 2.0).all())
    assert len(thread_ids() - before) == 1
    let_workers_go()


def test_a_thread_that_submits_lets_its_workers_go(two_threads: None) -> None:
    model = make_model("llama")
    hf_paged.enable(model)
    try:
        engine = hf_paged.engine(model)
        engine.submit([1, 2, 3], max_new_tokens=3, do_sample=False).result(60)
        wait_for_loading()  # of kernels, which have a thread of their own
        workers = new_workers()
        assert workers
        assert len(engine.submit([1, 2, 3], max_new_tokens=3, do_sample=False).result(60).token_ids) == 3
        assert are_gone(workers)
    finally:
        hf_paged.disable(model)


def test_a_forked_child_does_not_wait_for_workers_it_does_not_have(two_threads: None) -> None:
    work()
    child = os.fork()
    if not child:
        let_workers_go()
        os._exit(7)
    for _ in range(500):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.02)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 7
    let_workers_go()


CHILD_OF_WORKERS = """
import os, sys, torch
torch.set_num_threads(2)
torch.ones(1 << 20).mul_(2.0)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(1)
import hf_paged
from tests.helpers import ROOT, make_model
model = hf_paged.enable(make_model("gpt2"))
assert len(hf_paged.engine(model).submit([5, 6], max_new_tokens=3, eos_token_id=None).result(60).token_ids) == 3
os._exit(0)
"""


def test_a_fork_before_the_import_is_noticed() -> None:
    """Its copy of the runtime believes in workers that are not there, and would wait for their end."""
    done = subprocess.run([sys.executable, "-c", CHILD_OF_WORKERS], cwd=ROOT, timeout=120)
    assert done.returncode == 0
