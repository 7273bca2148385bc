"""Requests of one unpadded prompt each: checked, prepared by upstream, refused where they can never run."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import stopping_criteria

from hf_paged.errors import InvalidRequestError
from hf_paged.generation.checks import late_reasons, request_reasons
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.input_checks import length_reasons
from hf_paged.generation.prepared import Prepared, prepare
from hf_paged.generation.returned_cache import fill_pending
from hf_paged.generation.shared import Preparations
from hf_paged.generation.view import GenerativeModel, HubDecodingMode

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: Reasons that no `generate()` can help: the request itself is wrong or can never fit.
_INVALID = frozenset({"input_ids", "token_range", "kv_budget", "no_length_limit"})
#: Arguments of `generate()` that a request says otherwise or that its result has no place for.
_NOT_FOR_REQUESTS = {
    "inputs": "the prompt is given as token ids",
    "input_ids": "the prompt is given as token ids",
    "inputs_embeds": "the prompt is given as token ids",
    "attention_mask": "prompts are not padded",
    "past_key_values": "a cache belongs to one call of generate()",
    "return_dict_in_generate": "the result is a GenerationResult",
    "output_scores": "the result is a GenerationResult",
    "output_logits": "the result is a GenerationResult",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what upstream's preparation made of it.

    With `reasons` the original `generate()` must run it; `prepared` is None where preparing could not come
    that far.
    """

    token_ids: list[int]
    prepared: Prepared | None
    reasons: tuple[FallbackReason, ...] = ()

    @property
    def native(self) -> Prepared | None:
        """The preparation, if the engine can run it."""
        return None if self.reasons else self.prepared


class RequestPreparer:
    """Prepares single prompts for one model and one set of `generate()` arguments.

    Preparations (about 0.5 ms each) are shared by prompts of one config, or of one config and length, where
    nothing in them belongs to one prompt.

    Args:
        shared: finds those of earlier requests with equal arguments; None: there are none. It is asked again
            before another is kept: configs may have changed in another thread while upstream prepared.

    Raises:
        InvalidRequestError: an argument has no meaning for requests.
    """

    def __init__(
        self,
        model: GenerativeModel,
        engine: PagedEngine,
        kwargs: Mapping[str, Any],
        shared: Callable[[], Preparations] | None = None,
    ) -> None:
        for name, why in _NOT_FOR_REQUESTS.items():
            if kwargs.get(name) is not None:
                raise InvalidRequestError(f"{name} is not an option of a single request: {why}")
        fill_pending(engine)
        self._model = model
        self._engine = engine
        self._kwargs = dict(kwargs)
        self._early = tuple(request_reasons(model, None, engine, (), kwargs))
        own = Preparations()
        self._shared = (lambda: own) if shared is None else shared

    def __call__(self, prompt: Any, config: GenerationConfig | None) -> Request:
        """The request for `prompt`, a 1-D list or tensor of token ids.

        Raises:
            InvalidRequestError: the prompt is no list of token ids of this model, upstream refuses the
            options,
                or the request can never fit.
        """
        token_ids = as_token_ids(prompt, self._engine)
        if self._early:
            return Request(token_ids, None, self._early)
        if getattr(config, "token_healing", None):  # what is prepared for one prompt may serve others
            return Request(token_ids, None, (reason("token_healing"),))
        options, limit = _content(config), self._limit(config)
        preparations = self._shared()
        shared = preparations.find(options, limit, len(token_ids))
        if shared is None or limit is None:
            request = self._prepare(token_ids, config)
            if request.native is not None and self._shared() is preparations:
                preparations.keep(request.native, options, limit, len(token_ids))
            return request
        prepared = _of_length(shared, torch.tensor([token_ids], device=shared.input_ids.device), limit)
        return _checked(token_ids, prepared, length_reasons(self._engine, prepared))

    def _limit(self, config: GenerationConfig | None) -> int | None:
        """`max_new_tokens` of a request where it is given plainly, else None."""
        limit = self._kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        return limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else None

    def arguments(self, token_ids: list[int], config: GenerationConfig | None) -> dict[str, Any]:
        """The arguments of the `generate()` that equals a request."""
        ids = torch.tensor([token_ids], device=self._model.device)
        return {
            **self._kwargs,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "generation_config": config,
        }

    def _prepare(self, token_ids: list[int], config: GenerationConfig | None) -> Request:
        try:
            prepared = prepare(self._model, (), self.arguments(token_ids, config))
        except HubDecodingMode as mode:
            return Request(token_ids, None, (reason("hub_decoding", str(mode)),))
        except Exception as error:
            raise InvalidRequestError(str(error)) from error
        copies = prepared.config.num_return_sequences or 1
        if copies > 1 and prepared.method != "_beam_search":
            raise InvalidRequestError(
                f"num_return_sequences={copies}: a request gives one sequence. For more, give the prompt "
                "several times: the prefix cache shares its blocks"
            )
        return _checked(token_ids, prepared, late_reasons(self._model, self._engine, prepared))


def as_token_ids(prompt: Any, engine: PagedEngine) -> list[int]:
    """`prompt` as a list of ints.

    Raises:
        InvalidRequestError: it is not a flat, non-empty list of token ids that the engine's model knows, or has more
            of them than the model has positions.
    """
    if isinstance(prompt, str):
        raise InvalidRequestError("the prompt is text: give token ids")
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    try:
        token_ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise InvalidRequestError("the prompt must be a flat list of token ids (ints)") from None
    if not token_ids:
        raise InvalidRequestError("the prompt is empty: at least one token id is needed")
    low, high, vocab_size = min(token_ids), max(token_ids), engine.vocab_size
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(f"token id {low if low < 0 else high} is outside of 0..{vocab_size - 1}")
    if engine.position_limit is not None and len(token_ids) > engine.position_limit:
        raise InvalidRequestError(
            f"a prompt of {len(token_ids)} tokens: the model has {engine.position_limit} positions"
        )
    return token_ids


def _checked(token_ids: list[int], prepared: Prepared, reasons: Iterable[FallbackReason]) -> Request:
    found = tuple(reasons)
    invalid = [r for r in found if r.code in _INVALID]
    if invalid:
        raise InvalidRequestError("; ".join(r.text for r in invalid))
    return Request(token_ids, prepared, found)


def _content(config: GenerationConfig | None) -> Hashable:
    """The options of a config but for `max_new_tokens`: equal for configs of equal content."""
    if config is None:
        return None
    return tuple(
        (name, repr(value))
        for name, value in vars(config).items()
        if value is not None and name != "max_new_tokens"
    )


def _of_length(prepared: Prepared, input_ids: Tensor, max_new_tokens: int) -> Prepared:
    """A preparation for another prompt and limit: only the mask and the length criterion know of them."""
    criteria = type(prepared.criteria)(prepared.criteria)
    for i, criterion in enumerate(criteria):
        if type(criterion) is stopping_criteria.MaxLengthCriteria:
            criteria[i] = moved = copy.copy(criterion)
            moved.max_length = input_ids.shape[1] + max_new_tokens
    # transformers before 5.23 keeps a mask of ones, as long as the prompt it was made for.
    unpadded = prepared.model_kwargs | {"attention_mask": None, "position_ids": None}
    return dataclasses.replace(prepared, input_ids=input_ids, criteria=criteria, model_kwargs=unpadded)
