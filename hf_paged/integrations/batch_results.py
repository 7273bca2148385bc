"""Outputs of a manager's requests: made of the engine's sequences, and handed to whoever waits for them."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

if TYPE_CHECKING:
    from hf_paged.engine.request import Call, Sequence


class _Output(GenerationOutput):
    """For versions of transformers that never call a failed request finished: `generate_batch` would wait for ever."""

    def is_finished(self) -> bool:
        return self.status in (RequestStatus.FINISHED, RequestStatus.FAILED)


_failed = GenerationOutput(request_id="", status=RequestStatus.FAILED)
_OUTPUT: type[GenerationOutput] = GenerationOutput if _failed.is_finished() else _Output
#: Versions of transformers differ in them.
_OUTPUT_FIELDS = {f.name for f in dataclasses.fields(GenerationOutput)}


@dataclass(eq=False)
class AddedRequest:
    """A request as it was added to a manager, and the engine's call once it began."""

    request_id: str
    index: int  # order of adding
    prompt: list[int]
    max_new_tokens: int | None  # None: no limit
    eos_token_id: Any
    streaming: bool
    record_timestamps: bool
    options: dict[str, Any]
    created_time: float = field(default_factory=time.perf_counter)
    call: Call | None = None
    limit: int = 0  # new tokens at which the engine stops
    cancelled: bool = False
    timestamps: dict[int, list[float]] = field(default_factory=dict)  # by row

    def output(self, sequence: Sequence, status: RequestStatus, error: str | None = None) -> GenerationOutput:
        """The output of one row as it stands. Further rows than the first have upstream's names for copies."""
        call, spec = sequence.call, sequence.call.sampling
        tokens = sequence.generated_ids
        logprobs = [] if spec.logprobs is None else [p.logprob for p in spec.token_logprobs[sequence.row]]
        stamps = self.timestamps.get(sequence.row, []) if self.record_timestamps else None
        fields: dict[str, Any] = {
            "request_id": self.request_id + (f"__child#{sequence.row - 1}" if sequence.row else ""),
            "prompt_ids": self.prompt,
            "generated_tokens": tokens,
            "logprobs": logprobs[: len(tokens)],
            "error": error,
            "status": status,
            "created_time": self.created_time,
            "lifespan": (call.first_scheduled_at or -1, call.finished_at or -1),
            "timestamps": None if stamps is None else list(stamps),
        }
        return _OUTPUT(**{k: v for k, v in fields.items() if k in _OUTPUT_FIELDS})

    def failures(self, error: BaseException) -> list[GenerationOutput]:
        """The outputs of a request that failed, with the tokens made before."""
        if self.call is not None:
            return [self.output(s, RequestStatus.FAILED, str(error)) for s in self.call.sequences]
        output = _OUTPUT(request_id=self.request_id, prompt_ids=self.prompt, error=str(error))
        output.status, output.created_time = RequestStatus.FAILED, self.created_time
        return [output]


class Results:
    """Outputs in the order they come: to a handler registered for their request, else to the queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue[GenerationOutput] = queue.Queue()
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], Any], asyncio.AbstractEventLoop]] = {}

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()

    def put(self, output: GenerationOutput) -> None:
        """From any thread; neither raises nor blocks."""
        handler = self._handlers.get(output.request_id)
        if handler is None:
            self._queue.put(output)
            return
        callback, loop = handler
        if output.is_finished():
            self._handlers.pop(output.request_id, None)
        try:
            loop.call_soon_threadsafe(callback, output)
        except RuntimeError:
            pass  # its event loop was closed: nobody is left to tell

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        """The next output; None after `timeout` seconds, or if it is another request's than `request_id`."""
        try:
            output = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if request_id is not None and output.request_id != request_id:
            self._queue.put(output)
            return None
        return output

    def register(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Sends the outputs of a request to `callback` on the event loop that runs now."""
        self._handlers[request_id] = (callback, asyncio.get_running_loop())
