"""`Wake`: what is set before or during a wait ends it, once."""

from __future__ import annotations

import threading

from hf_paged.engine.wake import Wake


def waits(wake: Wake) -> bool:
    """Whether a thread that waits now is still waiting after a moment; then it is woken."""
    thread = threading.Thread(target=wake.wait, daemon=True)
    thread.start()
    thread.join(0.1)
    waited = thread.is_alive()
    if waited:
        wake.set()
        thread.join(10)
        assert not thread.is_alive()
    return waited


def test_a_new_one_makes_wait() -> None:
    assert waits(Wake())


def test_set_before_the_wait_ends_it_and_only_that_one() -> None:
    wake = Wake()
    wake.set()
    wake.set()
    assert not waits(wake)
    assert waits(wake)


def test_what_was_cleared_wakes_nobody() -> None:
    wake = Wake()
    wake.set()
    wake.clear()
    wake.clear()
    assert waits(wake)


def test_many_threads_may_set_it_at_once() -> None:
    wake = Wake()
    errors: list[BaseException] = []

    def set_often() -> None:
        try:
            for _ in range(2000):
                wake.set()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=set_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        wake.clear()
    assert not errors
    wake.set()
    assert not waits(wake)
