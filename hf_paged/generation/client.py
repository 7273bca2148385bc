"""`hf_paged.engine(model)`: handing single requests to the engine of an enabled model."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from hf_paged.engine.draws import SeededDraws
from hf_paged.errors import FallbackError, InvalidRequestError
from hf_paged.generation.adapters import select
from hf_paged.generation.handle import RequestHandle
from hf_paged.generation.requests import build_call
from hf_paged.generation.shared import preparations_of
from hf_paged.generation.single import RequestPreparer
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.sampling import LogitsEdit


class EngineClient:
    """The engine of one enabled model, as users see it."""

    def __init__(self, model: GenerativeModel, engine: PagedEngine) -> None:
        self._model = model
        self._engine = engine

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and new ones, that a request can have: by the KV cache, and by the positions."""
        limits = [self._engine.capacity_tokens(), self._engine.position_limit, self._engine.rope_limit]
        return min(limit for limit in limits if limit is not None)

    def trouble(self, stalled_after: float | None = None) -> str | None:
        """Why the engine does not work as things stand; None if nothing is known against it.

        A failed step is held against it until one succeeds: submit a short request to find out.

        Args:
            stalled_after: seconds after which a running step counts as hanging; None for never.
        """
        return self._engine.trouble(stalled_after)

    def submit(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        adapter: str | Sequence[str] | None = None,
        priority: int = 0,
        seed: int | None = None,
        logprobs: int | None = None,
        tokenizer: Any = None,
        raw_logprobs: bool = False,
        logits_edit: LogitsEdit | None = None,
        cache_salt: str = "",
        **kwargs: Any,
    ) -> RequestHandle:
        """Starts generating for one prompt and returns at once.

        Args:
            input_ids: 1-D list or tensor of token ids, without padding.
            generation_config, kwargs: as for `generate`.
            adapter: name of the PEFT adapter to run with, a list of names that add up, or "__base__" for none of
                them. None: those active now, whatever becomes active later.
            priority: requests with a lower number run first when not all can run.
            seed: of this request's random numbers, which then depend on nothing else. None: one is drawn from
                the global generator, so that requests submitted in equal order after one `set_seed` repeat.
            logprobs: report each new token's log-probability and those of this many likeliest tokens.
            tokenizer: needed with `stop_strings`.
            raw_logprobs: take log-probabilities from the model's logits, before penalties, temperature and cuts.
            logits_edit: called with (the new tokens so far, the next logits [vocab]) to edit those in place before
                all processors; in the engine's thread, so it must be quick. What it raises fails this request.
            cache_salt: cached prefixes are only shared between requests of one salt.

        Raises:
            InvalidRequestError: the request is malformed, refused by upstream's own checks, or can never fit.
            FallbackError: an option only the original `generate()` can serve; falling back here would block.
            EngineStateError: the model is not enabled any more.
        """
        if logprobs is not None and (type(logprobs) is not int or logprobs < 0):
            raise InvalidRequestError(f"logprobs={logprobs!r}: must be None or an int of at least 0")
        if tokenizer is not None:
            kwargs["tokenizer"] = tokenizer
        shared = functools.partial(
            preparations_of, self._model, self._engine, generation_config, dict(kwargs)
        )
        request = RequestPreparer(self._model, self._engine, kwargs, shared)(input_ids, generation_config)
        prepared = request.native
        if prepared is None:
            listed = "; ".join(map(str, request.reasons))
            raise FallbackError(f"submit serves native requests only: {listed}", request.reasons)
        if prepared.method == "_beam_search" and (logprobs is not None or logits_edit is not None):
            raise InvalidRequestError(
                f"num_beams={prepared.config.num_beams}: logprobs and logits_edit are of single sequences"
            )
        selection = select(self._engine, adapter)
        draws = None
        if prepared.config.do_sample:
            draws = SeededDraws(fresh_seed() if seed is None else seed)
        call = build_call(
            self._engine,
            prepared,
            [selection] * prepared.num_copies,
            draws=draws,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            edit=logits_edit,
            namespaces=self._engine.namespaces([selection], cache_salt),
            priority=priority,
            outputs=False,
        )
        self._engine.count_native()
        call.submitted_at = time.perf_counter()
        handle = RequestHandle(self._engine)
        handle.start(call)
        return handle


def fresh_seed() -> int:
    """A seed drawn from torch's global generator: 63 random bits."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
