"""`hf_paged.enable(pipe)`: lists, datasets and generators given to a text-generation pipeline run as one stream.

Upstream hands a list to `generate()` one prompt at a time, or in padded batches. Here the pipeline's own loader and
`preprocess` feed requests to the engine while earlier ones run, and its own `postprocess` makes the results, in order:
no padding, no batch to fill or drain. What cannot run as a stream goes through the pipeline as it was.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineIterator

from hf_paged.engine import registry
from hf_paged.errors import UnsupportedModelError
from hf_paged.integrations.request_stream import RequestStream
from hf_paged.patches.instance import InstancePatch
from hf_paged.resolve import resolve_model

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: Patched pipelines, and the engine their patch goes away with.
_patched: weakref.WeakKeyDictionary[Any, tuple[InstancePatch, weakref.ref[PagedEngine]]]
_patched = weakref.WeakKeyDictionary()


def attach(pipe: Any, engine: PagedEngine) -> bool:
    """Makes `pipe` feed its inputs to `engine` as a stream. Returns whether it did not do so before.

    A pipeline whose `get_iterator` is not upstream's keeps it: its calls of `generate()` are served one by one.
    """
    if pipe in _patched:
        patch, owner = _patched[pipe]
        if owner() is engine:
            return False
        patch.revert()  # of another model that was in this pipeline before
    if "get_iterator" in vars(pipe) or type(pipe).get_iterator is not Pipeline.get_iterator:
        return False
    patch = InstancePatch(pipe)
    patch.set("get_iterator", _make_get_iterator(pipe))
    _patched[pipe] = (patch, weakref.ref(engine))
    return True


def detach(pipe: Any) -> None:
    """Makes `pipe` what it was. Does nothing if it was not attached."""
    entry = _patched.pop(pipe, None)
    if entry is not None:
        entry[0].revert()


def detach_all(engine: PagedEngine) -> None:
    """Detaches every pipeline of `engine`."""
    for pipe in [pipe for pipe, (_patch, owner) in _patched.items() if owner() is engine]:
        detach(pipe)


def _make_get_iterator(pipe: Any) -> Any:
    reference = weakref.ref(pipe)

    def get_iterator(
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: Mapping[str, Any],
        forward_params: Mapping[str, Any],
        postprocess_params: Mapping[str, Any],
    ) -> PipelineIterator:
        pipe = reference()
        if pipe is None:
            raise ReferenceError("the pipeline this get_iterator belongs to no longer exists")
        params = (preprocess_params, forward_params, postprocess_params)
        engine = _engine_of(pipe)
        if engine is None:
            return type(pipe).get_iterator(pipe, inputs, num_workers, batch_size, *params)
        return PipelineStream(pipe, engine, inputs, num_workers, batch_size, params)

    return get_iterator


def _engine_of(pipe: Any) -> PagedEngine | None:
    # Asked anew for each call: users put another model into a pipeline, or disable the one inside.
    try:
        return registry.get(resolve_model(pipe))
    except UnsupportedModelError:
        return None


class PipelineStream(PipelineIterator):
    """What an enabled `pipe(inputs)` iterates over, in place of upstream's: lazy, in order, of the same length.

    Sampled items draw one seed from the global generator and then streams by (seed, place in the inputs): the same
    after `set_seed` whatever runs together, but not upstream's sequence. Inputs are taken ahead of the results, so
    they must not wait for them. Dropping the iterator cancels what runs.
    """

    def __init__(
        self,
        pipe: Any,
        engine: PagedEngine,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        params: tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]],
    ) -> None:
        self._pipe, self._engine, self._inputs = pipe, engine, inputs
        self._num_workers, self._batch_size, self._stages = num_workers, batch_size, params
        # Upstream's own iterator, for its length and its checks of the arguments.
        super().__init__(self._upstream(inputs, batch_size), None, {})
        self._results: Iterator[Any] | None = None

    def __iter__(self) -> PipelineStream:
        # What can be gone through again starts anew, as upstream's does; an iterator goes on where it was.
        if not isinstance(self._inputs, Iterator):
            self._results = None  # cancels what a former iteration left running
        return self

    def __next__(self) -> Any:
        if self._results is None:
            self._results = self._start()
        return next(self._results)

    def _start(self) -> Iterator[Any]:
        source = self._inputs if isinstance(self._inputs, Sized) else _Replayed(self._inputs)
        # The loader inside upstream's iterator over single items: it maps `preprocess`, in workers if asked to.
        items = iter(self._upstream(source, 1).loader.loader)
        _preprocess, forward, postprocess = self._stages
        stream = RequestStream(
            self._pipe, self._engine, items, forward, postprocess, batched=self._batch_size > 1
        )
        return stream if stream.starts() else iter(self._upstream(source, self._batch_size))

    def _upstream(self, inputs: Any, batch_size: int) -> PipelineIterator:
        pipe = self._pipe
        return type(pipe).get_iterator(pipe, inputs, self._num_workers, batch_size, *self._stages)


class _Replayed:
    """An iterable of unknown length whose first item can be had a second time."""

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs
        self._rest: Iterator[Any] | None = None
        self._first: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        if self._rest is None:
            self._rest = iter(self._inputs)
            self._first = list(itertools.islice(self._rest, 1))
        yield from self._first
        yield from self._rest
