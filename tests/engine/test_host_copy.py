"""Copies between host and device: nothing to do on a CPU, nothing to wait for but themselves on a GPU."""

from __future__ import annotations

import pytest
import torch

from hf_paged.engine.host_copy import PendingCopy, to_device, to_host

CPU = torch.device("cpu")


def test_a_cpu_copies_nothing() -> None:
    tensor = torch.tensor([3, 1, 2])
    assert to_device(tensor, CPU) is tensor
    assert to_host(tensor) == [3, 1, 2]
    copy = PendingCopy(tensor)
    assert copy.is_in_order
    assert copy.wait() == [3, 1, 2]
    assert copy.wait() == [3, 1, 2]


def slow_work(device: torch.device) -> None:
    """Some milliseconds of the device's, launched at once."""
    torch.cuda._sleep(50_000_000)


@pytest.mark.gpu
def test_a_pending_copy_waits_for_its_own_numbers_only() -> None:
    device = torch.device("cuda")
    tensor = torch.arange(5, device=device)
    copy = PendingCopy(tensor)
    slow_work(device)
    after = torch.cuda.Event()
    after.record()
    assert copy.wait() == [0, 1, 2, 3, 4]
    assert not after.query(), "it waited for what was launched later"
    after.synchronize()


@pytest.mark.gpu
def test_copies_do_not_wait_for_the_work_before_them() -> None:
    device = torch.device("cuda")
    # What is loaded and pinned at its first use may well wait.
    PendingCopy(to_device(torch.arange(4), device) + 1).wait()
    slow_work(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(torch.arange(4), device)
        back = PendingCopy(there + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the host waited"
    assert back.wait() == [1, 2, 3, 4]


@pytest.mark.gpu
def test_other_streams_are_out_of_order() -> None:
    device = torch.device("cuda")
    copy = PendingCopy(torch.arange(3, device=device))
    assert copy.is_in_order
    with torch.cuda.stream(torch.cuda.Stream(device)):
        assert not copy.is_in_order
    assert copy.wait() == [0, 1, 2]


@pytest.mark.gpu
def test_numbers_are_those_at_the_copy_whatever_is_written_later() -> None:
    tensor = torch.arange(3, device="cuda")
    copy = PendingCopy(tensor)
    tensor.add_(10)
    assert copy.wait() == [0, 1, 2]
