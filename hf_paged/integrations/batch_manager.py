"""`PagedBatchingManager`: transformers' manager of continuous batching, with the paged engine behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from hf_paged.generation.view import GenerativeModel
from hf_paged.integrations.batch_requests import BatchRequests
from hf_paged.integrations.batch_results import AddedRequest, Results

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call, Sequence

logger = logging.get_logger(__name__)


class PagedBatchingManager(ContinuousBatchingManager):
    """As upstream's: add requests, take `GenerationOutput`s, in whatever order they end.

    Requests added before `start()` or while paused begin afterwards. `pause()` lets what runs end first, so that
    weights may change inside. Made by `model.init_continuous_batching()` of an enabled model.
    """

    def __init__(
        self,
        model: GenerativeModel,
        engine: PagedEngine,
        requests: BatchRequests,
        generation_config: Any,
        continuous_batching_config: Any,
        keep: Callable[[PagedBatchingManager], None],
    ) -> None:
        # Not upstream's: it would switch the model's attention and size a pool.
        self.model = model
        self.generation_config = generation_config
        self.continuous_batching_config = continuous_batching_config
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self.is_tp_driver = True
        self.batch_processor = None
        self.warmed_up = True
        self._engine, self._requests, self._keep = engine, requests, keep
        self._results = Results()
        self._changed = threading.Condition()
        self._running: dict[str, AddedRequest] = {}
        self._backlog: list[AddedRequest] = []
        self._num_added = 0
        self._started = self._stopping = False
        self._pauses = self._holds = 0

    # --- from start to end ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to serve requests."""
        if self._started:
            logger.warning("Manager thread is already running.")
            return
        self._started, self._stopping = True, False
        self._requests.begin()
        self._begin_backlog()

    def is_running(self) -> bool:
        """Whether requests are served: from `start` until all requests have ended after `stop`."""
        return self._started and not (self._stopping and not self._running)

    def warmup(self) -> None:
        """Nothing to do."""

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Takes no more requests and, if `block`, waits for those added, `timeout` seconds at most.

        Args:
            keep_for_next_session: the model's next manager is this one.
            hard_stop: fail what still runs instead.
        """
        if not self._started:
            logger.warning("Manager not started.")
            return
        if self._pauses:
            raise RuntimeError(
                "Cannot stop the manager from inside a pause: leave the `pause` context first."
            )
        self._stopping = True
        if hard_stop:
            with self._changed:
                waiting, self._backlog = self._backlog, []
            for request in waiting:
                self._fail(request, RuntimeError("the manager was stopped before this request began"))
            for call in [r.call for r in self._unfinished() if r.call is not None]:
                self._engine.cancel(call)
        if block:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session:
            self._keep(self)

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Waits until no request runs, `timeout` seconds at most."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, timeout):
                logger.warning(f"{len(self._running)} requests did not end within {timeout} s.")
                return
        if self._stopping:
            self._started = False

    def destroy(self) -> None:
        """Stops for good."""
        if self.is_running():
            self.stop(block=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for what runs; the model is the caller's inside, and requests added meanwhile begin afterwards."""
        if not self.is_running():
            raise RuntimeError("Cannot pause generation while no generation loop is running.")
        with self._changed:
            self._pauses += 1
        try:
            with self._engine.paused():
                yield
        finally:
            with self._changed:
                self._pauses -= 1
            self._begin_backlog()

    # --- requests ---------------------------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Adds a request and returns its id; None, with a warning, once the manager stops.

        Arguments left None are the generation config's. What is wrong with a request is the error of its result.
        """
        if self._stopping:
            logger.warning("The manager is stopping. The request will be dropped.")
            return None
        config = self.generation_config
        with self._changed:
            index = self._num_added
            self._num_added += 1
        request = AddedRequest(
            request_id=f"req_{index}" if request_id is None else request_id,
            index=index,
            prompt=list(input_ids),
            max_new_tokens=config.max_new_tokens if max_new_tokens is None else max_new_tokens,
            eos_token_id=config.eos_token_id if eos_token_id is None else eos_token_id,
            streaming=streaming,
            record_timestamps=record_timestamps,
            options=logit_processor_kwargs,
        )
        with self._changed:
            self._running[request.request_id] = request
            self._backlog.append(request)
        self._begin_backlog()
        return request.request_id

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Adds several and returns their ids, in their order."""
        with self._changed:
            self._holds += 1  # so that they begin together
        try:
            ids = [
                self.add_request(
                    input_ids,
                    max_new_tokens=max_new_tokens,
                    streaming=streaming,
                    record_timestamps=record_timestamps,
                    **logit_processor_kwargs,
                )
                for input_ids in inputs
            ]
        finally:
            with self._changed:
                self._holds -= 1
            self._begin_backlog()
        return [request_id for request_id in ids if request_id is not None]

    def cancel_request(self, request_id: str) -> None:
        """Ends a request. As with upstream it gives no result then."""
        with self._changed:
            request = self._running.get(request_id)
            if request is None:
                return
            request.cancelled = True
            if request in self._backlog:
                self._backlog.remove(request)
                self._end(request)
        if request.call is not None:
            self._engine.cancel(request.call)

    # --- results ----------------------------------------------------------------------------------------------------

    def get_result(
        self, request_id: str | None = None, timeout: float | None = None
    ) -> GenerationOutput | None:
        """The next result; None after `timeout` seconds, or if it is another request's than `request_id`."""
        if self._results.is_empty and not self._started:
            return None
        return self._results.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, while the manager runs."""
        while self.is_running():
            result = self.get_result(timeout=0.1)
            if result is not None:
                yield result

    def request_id_iter(self, request_id: str) -> Generator[GenerationOutput]:
        """Results of one request, up to its last."""
        while self.is_running():
            result = self.get_result(request_id=request_id, timeout=0.1)
            if result is not None:
                yield result
                if result.is_finished():
                    return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Results of one request go to `callback`, on the running event loop, instead of to `get_result`."""
        self._results.register(request_id, callback)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _unfinished(self) -> list[AddedRequest]:
        with self._changed:
            return list(self._running.values())

    def _begin_backlog(self) -> None:
        with self._changed:
            if not self._started or self._pauses or self._holds:
                return
            requests, self._backlog = self._backlog, []
        self._requests.look_again()
        # Made before the first of them runs: two threads at work in the interpreter take turns of 5 ms.
        together = self._engine.config.max_num_seqs
        for first in range(0, len(requests), together):
            self._begin(requests[first : first + together])

    def _begin(self, requests: list[AddedRequest]) -> None:
        calls = {request: call for request in requests if (call := self._call(request)) is not None}
        try:
            if calls:
                self._engine.submit_all([*calls.values()])
        except Exception as error:  # it took none of them
            for request in calls:
                self._fail(request, error)

    def _call(self, request: AddedRequest) -> Call | None:
        """The engine's call for a request; None if it failed with that."""
        try:
            call = self._make_call(request)
            self._engine.check(call)
        except Exception as error:
            self._fail(request, error)
            return None
        self._engine.count_native()
        return call

    def _make_call(self, request: AddedRequest) -> Call:
        request.limit = request.max_new_tokens or 0
        if request.max_new_tokens is None:
            request.limit = self._requests.limit_for(len(request.prompt))
        call = self._requests.call(
            request.prompt,
            request.limit,
            request.eos_token_id,
            request.options,
            index=request.index,
        )
        request.call = call
        call.on_finish = lambda call: self._finished(request, call)
        if request.streaming or request.record_timestamps:
            call.on_token = lambda sequence, token: self._token(request, sequence, token)
        call.submitted_at = request.created_time
        return call

    def _token(self, request: AddedRequest, sequence: Sequence, token: int) -> None:
        request.timestamps.setdefault(sequence.row, []).append(time.perf_counter())
        # The last token comes with the finished output.
        last = token in sequence.call.sampling.eos_token_ids or sequence.num_generated >= request.limit
        if request.streaming and not last:
            self._results.put(request.output(sequence, RequestStatus.DECODING))

    def _finished(self, request: AddedRequest, call: Call) -> None:
        if request.cancelled:
            self._end(request)
        elif call.error is not None:
            self._fail(request, call.error)
        else:
            for sequence in call.sequences:
                if request.max_new_tokens is None and sequence.finish_reason == "length":
                    error = f"no end of sequence within the {request.limit} tokens there was room for"
                    self._results.put(request.output(sequence, RequestStatus.FAILED, error))
                else:
                    self._results.put(request.output(sequence, RequestStatus.FINISHED))
            self._end(request)

    def _fail(self, request: AddedRequest, error: BaseException) -> None:
        for output in request.failures(error):
            self._results.put(output)
        self._end(request)

    def _end(self, request: AddedRequest) -> None:
        with self._changed:
            self._running.pop(request.request_id, None)
            self._changed.notify_all()
