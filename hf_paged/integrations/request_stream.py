"""Items of a pipeline in, requests running ahead, results out in order.

The pipeline's own `forward` is run twice for each item: up to its call of `generate()`, which starts the request, and,
once the request has ended, again with its output as the answer. So whatever a version or a subclass does around
`generate()` is done, and a result has upstream's very form.
"""

from __future__ import annotations

import collections
import copy
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.generation import logits_process as warpers
from transformers.generation import stopping_criteria
from transformers.pipelines.text_generation import ReturnType

from hf_paged.engine.draws import SeededDraws
from hf_paged.engine.namespaces import Namespaces
from hf_paged.engine.sampling import unsupported
from hf_paged.generation.adapters import select_rows
from hf_paged.generation.backend import paged_generate
from hf_paged.generation.checks import late_reasons, request_reasons
from hf_paged.generation.client import fresh_seed
from hf_paged.generation.deferred import taken_by
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.outputs import sequences_tensor
from hf_paged.generation.prepared import Prepared, prepare
from hf_paged.generation.requests import build_call, pad_token_id
from hf_paged.generation.returned_cache import fill_pending
from hf_paged.generation.view import GenerativeModel, HubDecodingMode

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call

#: Sequences taken up and not delivered yet, in multiples of what one step can run: so many that short requests behind
#: a long one keep the steps full, and few enough that memory stays bounded.
_LOOK_AHEAD = 2
#: Items taken for each result that is ready: the window fills without keeping a result back.
_REFILL = 2
#: Reasons that lie in one prompt: others of the same stream may well be native.
_OF_ONE_PROMPT = frozenset({"rope_limit", "kv_budget", "token_range", "input_ids", "attention_mask"})
#: Processors and criteria to which it is all the same whether pads come before the prompt.
_BLIND_TO_PADS = frozenset(
    {
        warpers.EpsilonLogitsWarper,
        warpers.EtaLogitsWarper,
        warpers.InfNanRemoveLogitsProcessor,
        warpers.LogitNormalization,
        warpers.MinPLogitsWarper,
        warpers.SuppressTokensLogitsProcessor,
        warpers.TemperatureLogitsWarper,
        warpers.TopKLogitsWarper,
        warpers.TopPLogitsWarper,
        warpers.TypicalLogitsWarper,
        stopping_criteria.EosTokenCriteria,
        stopping_criteria.MaxLengthCriteria,
        stopping_criteria.StopStringCriteria,
    }
)


class _NotRun(BaseException):
    """Leaves a forward where it calls `generate()`. No Exception, so that nobody on the way handles it."""


@dataclass
class _Item:
    """One input on its way: a running request, an error to raise in its turn, or something to be run then."""

    inputs: Any = None  # what `preprocess` made of it
    outputs: Any = None  # what the forward made of it, where it called no `generate()`
    error: Exception | None = None
    prepared: Prepared | None = None
    call: Call | None = None
    reasons: Sequence[FallbackReason] = ()

    @property
    def is_ready(self) -> bool:
        return self.call is None or self.call.done.is_set()

    @property
    def num_sequences(self) -> int:
        return 1 if self.call is None else len(self.call.sequences)

    @property
    def options_cannot_stream(self) -> bool:
        """Whether it is not for its prompt alone that this item was not started."""
        if self.call is not None or self.error is not None or self.outputs is not None:
            return False
        return not self.reasons or any(r.code not in _OF_ONE_PROMPT for r in self.reasons)


class RequestStream:
    """Results of `items`, in order. An error is raised in the turn of its item; the next call goes on after it.

    Args:
        pipe: the pipeline whose `forward` and `postprocess` frame each request.
        engine: of the model in `pipe`.
        items: what `preprocess` made of the inputs, one at a time.
        forward, postprocess: parameters of the two stages.
        batched: the user asked for padded batches; what depends on pads must not be streamed.
    """

    def __init__(
        self,
        pipe: Any,
        engine: PagedEngine,
        items: Iterator[Any],
        forward: Mapping[str, Any],
        postprocess: Mapping[str, Any],
        *,
        batched: bool,
    ) -> None:
        self._pipe, self._engine, self._items = pipe, engine, items
        self._forward, self._postprocess, self._batched = forward, postprocess, batched
        self._pending: collections.deque[_Item] = collections.deque()
        self._in_flight = 0  # sequences of `_pending`
        self._most_in_flight = _LOOK_AHEAD * engine.config.max_num_seqs
        self._exhausted = False
        self._seed: int | None = None
        self._num_taken = 0
        #: Of the requests started for one result.
        self._namespaces: Namespaces | None = None

    def starts(self) -> bool:
        """Takes the first item; whether its options let it, and so all items, run as a stream."""
        self._take()
        return not (self._pending and self._pending[0].options_cannot_stream)

    def __iter__(self) -> RequestStream:
        return self

    def __next__(self) -> Any:
        try:
            self._fill()
            if not self._pending:
                raise StopIteration
            item = self._pending[0]
            if item.call is not None:
                item.call.done.wait()
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise
        self._pending.popleft()
        self._in_flight -= item.num_sequences
        return self._pipe.postprocess(self._outputs_of(item), **self._postprocess)

    def close(self) -> None:
        """Ends the stream and cancels what runs; its blocks go back at the next step."""
        self._exhausted = True
        _cancel(self._engine, self._unfinished())
        self._pending.clear()

    def __del__(self) -> None:
        # Wherever the garbage collector strikes, its thread may hold the engine's lock: never cancel in it.
        calls = self._unfinished()
        if calls:
            threading.Thread(target=_cancel, args=(self._engine, calls), daemon=True).start()

    def _unfinished(self) -> list[Call]:
        return [item.call for item in self._pending if item.call is not None and not item.is_ready]

    # --- taking items up --------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Takes items while the first result is not ready and there is room; some even if it is."""
        self._namespaces = None
        taken = 0
        while not self._exhausted and self._in_flight < self._most_in_flight:
            if self._pending:
                if self._pending[-1].error is not None:
                    return  # upstream takes nothing after an item that failed until it is asked to go on
                if taken >= _REFILL and self._pending[0].is_ready:
                    return
            self._take()
            taken += 1

    def _take(self) -> None:
        try:
            inputs = next(self._items)
        except StopIteration:
            self._exhausted = True
            return
        except Exception as error:
            item = _Item(error=error)
        else:
            item = self._start(inputs)
        self._pending.append(item)
        self._num_taken += 1
        self._in_flight += item.num_sequences

    def _start(self, inputs: Any) -> _Item:
        item = _Item(inputs)

        def generate(
            model: GenerativeModel, replaced: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> Any:
            fill_pending(self._engine)
            item.prepared, item.reasons = self._prepare(model, replaced, args, kwargs)
            if item.prepared is not None and not item.reasons and self._can_stream(item.prepared):
                item.call = self._submit(item.prepared)
            raise _NotRun

        try:
            with taken_by(self._engine, generate):
                item.outputs = self._pipe.forward(copy.copy(inputs), **self._forward)
        except _NotRun:
            pass
        except Exception as error:
            item.error = error
        return item

    def _prepare(
        self, model: GenerativeModel, replaced: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Prepared | None, list[FallbackReason]]:
        reasons = request_reasons(model, replaced, self._engine, args, kwargs)
        if reasons or kwargs.get("adapter_names") is not None:  # upstream's preparation does not know them
            return None, reasons
        try:
            prepared = prepare(model, args, kwargs)
        except HubDecodingMode as mode:
            return None, [reason("hub_decoding", str(mode))]
        return prepared, late_reasons(model, self._engine, prepared, attended=True)

    def _can_stream(self, prepared: Prepared) -> bool:
        """Whether a native call may run beside others of its kind and gives what upstream's batch would give."""
        if prepared.config.return_dict_in_generate or prepared.streamer is not None:
            return False
        # What users made keeps a state for one call at a time.
        if unsupported(prepared.processors, prepared.criteria):
            return False
        return not self._batched or self._is_blind_to_pads(prepared)

    def _is_blind_to_pads(self, prepared: Prepared) -> bool:
        """Whether the results of a padded batch show nothing of its pads: else they are upstream's batches to make."""
        tokenizer, show = self._pipe.tokenizer, self._postprocess
        if show.get("return_type") == ReturnType.TENSORS or show.get("skip_special_tokens") is False:
            return False
        pad = pad_token_id(prepared)  # None without EOS: there, rows that have ended go on until all have
        if getattr(tokenizer, "response_template", None) or pad not in tokenizer.all_special_ids:
            return False
        parts = {type(part) for part in (*prepared.processors, *prepared.criteria)}
        return parts <= _BLIND_TO_PADS and prepared.config.max_new_tokens is not None

    def _submit(self, prepared: Prepared) -> Call:
        draws = None
        if prepared.config.do_sample:
            if self._seed is None:
                self._seed = fresh_seed()
            draws = SeededDraws(self._seed, self._num_taken)
        selections = select_rows(self._engine, prepared)
        if self._namespaces is None or not self._namespaces.keys() >= set(selections):
            known = () if self._namespaces is None else self._namespaces.keys()
            self._namespaces = self._engine.namespaces([*known, *selections])
        call = build_call(self._engine, prepared, selections, draws=draws, namespaces=self._namespaces)
        self._engine.count_native()
        call.submitted_at = time.perf_counter()
        self._engine.submit(call)
        return call

    # --- handing results out ----------------------------------------------------------------------------------------

    def _outputs_of(self, item: _Item) -> Any:
        """What the pipeline's forward gives for `item`; runs it now if it is no request of the engine's."""
        if item.error is not None:
            raise item.error
        if item.outputs is not None:
            return item.outputs
        if item.call is None or item.prepared is None:
            return self._pipe.forward(item.inputs, **self._forward)
        if item.call.error is not None:
            raise item.call.error
        answers = [sequences_tensor(item.prepared, item.call)]

        def generate(
            model: GenerativeModel, replaced: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> Any:
            return answers.pop() if answers else paged_generate(model, replaced, self._engine, args, kwargs)

        with taken_by(self._engine, generate):
            return self._pipe.forward(item.inputs, **self._forward)


def _cancel(engine: PagedEngine, calls: Sequence[Call]) -> None:
    for call in calls:
        engine.cancel(call)
