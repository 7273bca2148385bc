"""From jobs to running choices and back: submitting off the event loop, and nothing left running whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from hf_paged.server.admission import Admission
from hf_paged.server.choice import Choice
from hf_paged.server.jobs import Job, Stops
from hf_paged.server.metrics import Metrics
from hf_paged.server.served_model import ServedModel

if TYPE_CHECKING:
    from hf_paged import RequestHandle

T = TypeVar("T")
#: Threads that tokenise, render and submit. They hold the interpreter's lock most of the time: more are not faster.
_THREADS = 2


class Runs:
    """The choices that run now."""

    def __init__(self, served: ServedModel, admission: Admission, metrics: Metrics) -> None:
        self._served = served
        self._metrics = metrics
        self.admission = admission
        self._open = asyncio.Event()  # jobs may be submitted
        self._open.set()
        self._quiet = asyncio.Event()  # none is being submitted
        self._quiet.set()
        self._submitting = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hf_paged-server")

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    @contextlib.asynccontextmanager
    async def started(self, jobs: list[Job], stops: Stops) -> AsyncIterator[list[Choice]]:
        """Runs `jobs`; when the block is left, in whatever way, none of them runs any more.

        Raises:
            APIError: 429.
            InvalidRequestError: the engine refuses a job; none of them runs then.
        """
        ticket = self.admission.enter(
            sum(job.sequences for job in jobs), sum(len(job.prompt) for job in jobs)
        )
        try:
            choices = [
                Choice(handle, job, stops, self._served.tokenizer.backend_tokenizer)
                for handle, job in zip(await self._submit(jobs), jobs, strict=True)
            ]
            try:
                yield choices
            finally:
                for choice in choices:
                    choice.handle.cancel()
                    self._metrics.ended(choice)
        finally:
            ticket.release()

    async def _submit(self, jobs: list[Job]) -> list[RequestHandle]:
        while not self._open.is_set():
            await self._open.wait()
        loop = asyncio.get_running_loop()
        # Not `run_in_executor`: when this task is cancelled the thread goes on, and what it starts must be stopped.
        submitting = self._threads.submit(self._submit_all, jobs)
        self._submitting += 1
        self._quiet.clear()
        submitting.add_done_callback(lambda _: loop.call_soon_threadsafe(self._submitted))
        try:
            return await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_all)
            raise

    def _submitted(self) -> None:
        self._submitting -= 1
        if not self._submitting:
            self._quiet.set()

    @contextlib.asynccontextmanager
    async def held_back(self) -> AsyncIterator[None]:
        """New jobs wait until the block is left: the model may be changed inside, once what runs has ended.

        A job that is prepared before a change and begins after it would fail. One holder at a time.
        """
        self._open.clear()
        try:
            await self._quiet.wait()
            yield
        finally:
            self._open.set()

    def _submit_all(self, jobs: list[Job]) -> list[RequestHandle]:
        handles: list[RequestHandle] = []
        try:
            for job in jobs:
                handles.append(
                    self._served.client.submit(
                        job.prompt,
                        job.config,
                        adapter=job.adapter,
                        priority=job.priority,
                        seed=job.seed,
                        logprobs=job.logprobs,
                        raw_logprobs=True,
                        logits_edit=job.edit,
                        cache_salt=job.cache_salt,
                    )
                )
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


def _cancel_all(submitted: Future[list[RequestHandle]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for handle in submitted.result():
            handle.cancel()
