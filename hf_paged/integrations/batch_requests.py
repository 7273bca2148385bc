"""From a prompt given to `generate_batch` or its manager to a call of the engine.

`generate_batch` has rules of its own: the generation config is taken as it is, without the model's defaults; of it, a
request may replace `max_new_tokens` and `eos_token_id`; nothing but these two ends a request. Here every logits
processor the config asks for is applied, also those that transformers' own leaves out with a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_paged.engine.draws import SeededDraws
from hf_paged.engine.namespaces import Namespaces
from hf_paged.errors import InvalidRequestError
from hf_paged.generation.adapters import select_rows
from hf_paged.generation.checks import late_reasons, request_reasons
from hf_paged.generation.client import fresh_seed
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.requests import build_call
from hf_paged.generation.single import as_token_ids
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call

#: Options without a meaning for `generate_batch`, and what says so.
_WITHOUT_MEANING = {
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "compile_config": None,
    "prefill_chunk_size": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
}
#: Options that transformers' own passes over in silence; what a user gets with them shall not depend on us.
_PASSED_OVER = ("stop_strings", "max_time")
_OF_ONE_PROMPT = frozenset({"rope_limit", "kv_budget", "token_range"})


class BatchRequests:
    """Makes the calls of one manager.

    Args:
        model: the enabled model; engine: its engine.
        generation_config: for all requests; it is left as it is.
        batching_config: of it `seed`, `return_logprobs` and `per_request_processors` have a meaning here, the rest
            shapes transformers' own pool and steps.
    """

    def __init__(
        self,
        model: GenerativeModel,
        engine: PagedEngine,
        generation_config: GenerationConfig,
        batching_config: Any,
    ) -> None:
        self._model, self._engine = model, engine
        self._config, self._batching = generation_config, batching_config
        self._namespaces: Namespaces | None = None
        self._configs: dict[tuple[Any, ...], GenerationConfig] = {}
        self._seed: int | None = getattr(batching_config, "seed", None)
        self._is_seeded = False

    def begin(self) -> None:
        """What upstream does when it starts to serve, greedy or not: draws a seed, if none is given, and sets it.

        So what the caller draws from torch's generators afterwards (a trainer its shuffles) is the same with either.
        """
        if self._is_seeded:
            return
        self._is_seeded = True
        if not hasattr(self._batching, "seed"):  # transformers before it had one
            self._seed = fresh_seed() if self._config.do_sample else None
            return
        if self._seed is None:
            device = self._model.device
            self._seed = int(torch.randint(0, 2**32 - 1, (1,), dtype=torch.int64, device=device))
        torch.manual_seed(self._seed)

    def reasons(self) -> list[FallbackReason]:
        """Why requests of this configuration cannot be the engine's, whatever their prompts."""
        config = self._config_for(1, self._config.eos_token_id, {})
        found = request_reasons(self._model, None, self._engine, (), {"generation_config": config})
        for name in _PASSED_OVER:
            if getattr(self._config, name, None) is not None:
                found.append(FallbackReason(name, f"generate_batch does not know {name}"))
        if (config.num_beams or 1) > 1:
            found.append(reason("beam_search", "generate_batch does not know num_beams"))
        if getattr(self._model, "_device_mesh", None) is not None:
            found.append(FallbackReason("tensor_parallel", "the model is split over several devices"))
        if found:
            return found
        late = late_reasons(self._model, self._engine, self._prepared([0, 0], config))
        return [r for r in late if r.code not in _OF_ONE_PROMPT]

    def call(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None,
        options: Mapping[str, Any],
        *,
        index: int,
    ) -> Call:
        """The engine call for one prompt, `num_return_sequences` rows.

        Args:
            max_new_tokens: at least 1; see `limit_for` where the user set none.
            eos_token_id: one, several, or None; negative ones never occur.
            options: processor options of this request.
            index: of the request, for its random numbers.

        Raises:
            ValueError: the prompt or an option is not one, or the request can never fit.
        """
        token_ids = as_token_ids(prompt, self._engine)
        if max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        self._check_options(options)
        prepared = self._prepared(token_ids, self._config_for(max_new_tokens, eos_token_id, options))
        found = late_reasons(self._model, self._engine, prepared)
        if found:
            raise InvalidRequestError("; ".join(r.text for r in found))
        draws = (
            SeededDraws(self._seed, index) if self._seed is not None and prepared.config.do_sample else None
        )
        logprobs = 0 if getattr(self._batching, "return_logprobs", False) else None
        selections = select_rows(self._engine, prepared)
        if self._namespaces is None or not self._namespaces.keys() >= set(selections):
            known = () if self._namespaces is None else self._namespaces.keys()
            self._namespaces = self._engine.namespaces([*known, *selections])
        return build_call(
            self._engine,
            prepared,
            selections,
            draws=draws,
            logprobs=logprobs,
            namespaces=self._namespaces,
            outputs=False,
        )

    def look_again(self) -> None:
        """Weights and adapters may have changed since the last calls were made."""
        self._namespaces = None

    def limit_for(self, num_prompt_tokens: int) -> int:
        """Most new tokens a prompt of this length can get, where the user set no limit."""
        engine = self._engine
        most = [n + 1 for n in (engine.position_limit, engine.rope_limit) if n is not None]
        return max(1, min(engine.capacity_tokens(), *most) - num_prompt_tokens)

    def _config_for(
        self, max_new_tokens: int, eos_token_id: int | Sequence[int] | None, options: Mapping[str, Any]
    ) -> GenerationConfig:
        eos = tuple(t for t in _as_list(eos_token_id) if t >= 0)
        key = (max_new_tokens, eos, tuple(sorted(options.items())))
        config = self._configs.get(key)
        if config is None:
            config = copy.deepcopy(self._config)
            for name, value in {**_WITHOUT_MEANING, **options}.items():
                if hasattr(config, name):
                    setattr(config, name, value)
            config.max_new_tokens, config.eos_token_id = max_new_tokens, list(eos) or None
            if config.pad_token_id is None and eos:
                config.pad_token_id = eos[0]  # nothing is padded; upstream would warn that it chooses one
            self._model._prepare_special_tokens(config, True, device=self._model.device)
            self._configs[key] = config
        return config

    def _prepared(self, token_ids: list[int], config: GenerationConfig) -> Prepared:
        copies = config.num_return_sequences or 1
        ids = torch.tensor([token_ids] * copies, device=self._model.device)
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(token_ids),
            encoder_input_ids=ids,
            device=self._model.device,
        )
        criteria = StoppingCriteriaList([MaxLengthCriteria(len(token_ids) + config.max_new_tokens)])
        if config._eos_token_tensor is not None:
            criteria.append(EosTokenCriteria(config._eos_token_tensor))
        method = GENERATION_MODES_MAPPING[config.get_generation_mode()]
        return Prepared(method, (), {}, ids, processors, criteria, config, False, None, {})

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Upstream's own check: only what the config already uses may be set for a request.

        Raises:
            ValueError, TypeError: an option cannot be set for a request, or not to this.
        """
        if not options:
            return
        from transformers.generation.continuous_batching import cb_logits_processors

        checked = cb_logits_processors.ContinuousBatchingLogitsProcessorList(
            self._model._get_logits_processor(self._config),
            per_request_processors=self._batching.per_request_processors,
            drop_unsupported_processors=self._batching.drop_unsupported_processors,
        )
        checked.check_kwargs(dict(options))


def configuration_reasons(model: GenerativeModel, arguments: Mapping[str, Any]) -> list[FallbackReason]:
    """Reasons that lie in how a manager is asked for, before its configuration is looked at."""
    found = []
    if model.__dict__.get("_cached_continuous_batching_manager") is not None:
        found.append(reason("foreign_generate", "a manager of transformers' own is kept on the model"))
    for name, value in arguments.items():
        if name != "workload_hints" and value is not None:  # hints how large a pool to make
            found.append(FallbackReason("generate_batch_argument", f"{name} is not known to hf_paged"))
    return found


def _as_list(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else [int(t) for t in eos_token_id]
