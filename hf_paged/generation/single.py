"""Requests of one unpadded prompt each: checked, prepared by upstream, refused where they can never run."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as upstream
from transformers.generation import stopping_criteria

from hf_paged.errors import InvalidRequestError
from hf_paged.generation.checks import early_reasons, late_reasons
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared, prepare
from hf_paged.generation.view import GenerativeModel, HubDecodingMode

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: Reasons that no `generate()` can help: the request itself is wrong or can never fit.
_INVALID = frozenset({"input_ids", "token_range", "position_limit", "kv_budget", "no_length_limit"})
#: Arguments of `generate()` that a request says otherwise or that its result has no place for.
_NOT_FOR_REQUESTS = {
    "inputs": "the prompt is given as token ids",
    "input_ids": "the prompt is given as token ids",
    "attention_mask": "prompts are not padded",
    "return_dict_in_generate": "the result is a GenerationResult",
    "output_scores": "the result is a GenerationResult",
    "output_logits": "the result is a GenerationResult",
}
#: Built-ins without a state or a prompt of their own: one object may serve many requests of equal length.
_SHAREABLE = frozenset(
    {
        upstream.EpsilonLogitsWarper,
        upstream.EtaLogitsWarper,
        upstream.ExponentialDecayLengthPenalty,
        upstream.ForcedBOSTokenLogitsProcessor,
        upstream.ForcedEOSTokenLogitsProcessor,
        upstream.InfNanRemoveLogitsProcessor,
        upstream.LogitNormalization,
        upstream.MinLengthLogitsProcessor,
        upstream.MinNewTokensLengthLogitsProcessor,
        upstream.MinPLogitsWarper,
        upstream.NoRepeatNGramLogitsProcessor,
        upstream.RepetitionPenaltyLogitsProcessor,
        upstream.SuppressTokensAtBeginLogitsProcessor,
        upstream.SuppressTokensLogitsProcessor,
        upstream.TemperatureLogitsWarper,
        upstream.TopKLogitsWarper,
        upstream.TopPLogitsWarper,
        upstream.TypicalLogitsWarper,
        stopping_criteria.EosTokenCriteria,
        stopping_criteria.MaxLengthCriteria,
        stopping_criteria.StopStringCriteria,
    }
)


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

    Preparations are shared by prompts of equal length and config where nothing in them belongs to one
    prompt, so that a thousand requests cost a few dozen preparations (about 0.4 ms each).

    Raises:
        InvalidRequestError: an argument has no meaning for requests.
    """

    def __init__(self, model: GenerativeModel, engine: PagedEngine, kwargs: Mapping[str, Any]) -> None:
        for name, why in _NOT_FOR_REQUESTS.items():
            if kwargs.get(name) is not None:
                raise InvalidRequestError(f"{name} is not an option of a single request: {why}")
        self._model = model
        self._engine = engine
        self._kwargs = dict(kwargs)
        self._early = tuple(early_reasons(model, None, engine, (), kwargs))
        self._shared: dict[tuple[int, int], Request] = {}

    def __call__(self, prompt: Any, config: GenerationConfig | None) -> Request:
        """The request for `prompt`, a 1-D list or tensor of token ids.

        Raises:
            InvalidRequestError: the prompt is no list of token ids of this model, the options are refused
            by upstream,
                or the request can never fit.
        """
        token_ids = as_token_ids(prompt, self._engine.vocab_size)
        if self._early:
            return Request(token_ids, None, self._early)
        key = (id(config), len(token_ids))
        shared = self._shared.get(key)
        if shared is None:
            request = self._prepare(token_ids, config)
            if request.native is None or not _is_shareable(request.native):
                return request
            shared = self._shared[key] = request
        assert shared.prepared is not None
        ids = torch.tensor([token_ids], device=shared.prepared.input_ids.device)
        return Request(token_ids, dataclasses.replace(shared.prepared, input_ids=ids))

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
        if copies > 1:
            raise InvalidRequestError(
                f"num_return_sequences={copies}: a request gives one sequence. For more, give the prompt "
                "several times: the prefix cache shares its blocks"
            )
        reasons = late_reasons(self._model, self._engine, prepared)
        invalid = [r for r in reasons if r.code in _INVALID]
        if invalid:
            raise InvalidRequestError("; ".join(r.text for r in invalid))
        return Request(token_ids, prepared, tuple(reasons))


def as_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """`prompt` as a list of ints.

    Raises:
        InvalidRequestError: it is not a flat, non-empty list of token ids below `vocab_size`.
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
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(f"token id {low if low < 0 else high} is outside of 0..{vocab_size - 1}")
    return token_ids


def _is_shareable(prepared: Prepared) -> bool:
    return all(type(part) in _SHAREABLE for part in (*prepared.processors, *prepared.criteria))
