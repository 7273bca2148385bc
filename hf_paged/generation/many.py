"""`generate_many`: a list of prompts in, a list of results out, everything between in one running batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from hf_paged.engine.adapters import Selection
from hf_paged.engine.draws import SeededDraws
from hf_paged.engine.namespaces import Namespaces
from hf_paged.engine.request import Call, FinishReason
from hf_paged.errors import FallbackError, InvalidRequestError
from hf_paged.generation.adapters import select_each
from hf_paged.generation.client import fresh_seed
from hf_paged.generation.fallback import report_fallback
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.requests import build_call
from hf_paged.generation.results import GenerationResult, RequestMetrics, result_of
from hf_paged.generation.single import Request, RequestPreparer
from hf_paged.generation.view import GenerativeModel

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def generate_many(
    engine: PagedEngine,
    model: GenerativeModel,
    inputs: Sequence[Any],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    adapters: Any = None,
    progress: bool = False,
    **kwargs: Any,
) -> list[GenerationResult]:
    """Generates for every prompt of `inputs`, each with its own length, and returns the results in their
    order.

    Greedy results equal `generate` called prompt by prompt. Sampled ones draw one seed from the global
    generator and then a stream of their own, by (seed, place in `inputs`, position): the same after
    `set_seed` whatever the batching, but not the sequence that `generate` would draw. A request that needs
    the original `generate()` runs on it, after the others. A request gives one sequence: for several,
    repeat its prompt, whose blocks are shared.

    Args:
        inputs: 1-D lists or tensors of token ids, without padding.
        generation_config: one for all, or one a prompt.
        adapters: name of the PEFT adapter all prompts run with, or a list with one a prompt: a name, a list of
            names that add up, "__base__" for no adapter, or None for those active now.
        progress: show a bar.
        kwargs: as for `generate`, the same for all prompts.

    Raises:
        InvalidRequestError: a request is malformed or can never fit. Nothing ran; the message names it.
        FallbackError: a request cannot be native and `fallback="error"` or `deterministic=True`. Nothing ran.
    """
    requests = _prepare_all(engine, model, inputs, generation_config, kwargs)
    if not requests:
        return []
    selections = select_each(engine, adapters, len(requests))
    if engine.config.forbids_fallback:
        _refuse_fallbacks(requests, engine.config.fallback_rule)
    # Drawn only when wanted: greedy runs leave the global generator alone.
    sampled = any(r.prepared is None or r.prepared.config.do_sample for r in requests)
    seed = fresh_seed() if sampled else 0
    namespaces = engine.namespaces(selections)
    calls = {
        i: _call(engine, r.native, seed, i, selections[i], namespaces)
        for i, r in enumerate(requests)
        if r.native is not None
    }
    with _bar(len(requests), progress) as advance:
        _run_all(engine, list(calls.values()), advance)
        results = []
        for i, request in enumerate(requests):
            if i in calls:
                results.append(result_of(calls[i]))
                continue
            config = _config_at(generation_config, i)
            with _active_in_model(engine, selections[i]):
                results.append(_run_original(engine, model, request, config, kwargs, (seed + i) % 2**63))
            advance()
    return results


def _prepare_all(
    engine: PagedEngine, model: GenerativeModel, inputs: Sequence[Any], configs: Any, kwargs: dict[str, Any]
) -> list[Request]:
    if isinstance(inputs, str) or not hasattr(inputs, "__len__"):
        raise InvalidRequestError("inputs must be a list of prompts, each a 1-D list or tensor of token ids")
    if isinstance(configs, Sequence) and len(configs) != len(inputs):
        raise InvalidRequestError(f"{len(configs)} generation configs for {len(inputs)} prompts")
    preparer = RequestPreparer(model, engine, kwargs)
    requests = []
    for i, prompt in enumerate(inputs):
        try:
            requests.append(preparer(prompt, _config_at(configs, i)))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"inputs[{i}]: {error}") from error
    return requests


def _config_at(configs: Any, index: int) -> GenerationConfig | None:
    return configs[index] if isinstance(configs, Sequence) else configs


def _refuse_fallbacks(requests: list[Request], rule: str) -> None:
    for i, request in enumerate(requests):
        if request.reasons:
            listed = "; ".join(map(str, request.reasons))
            raise FallbackError(
                f"inputs[{i}] cannot be served natively and {rule}: {listed}", request.reasons
            )


def _call(
    engine: PagedEngine,
    prepared: Prepared,
    seed: int,
    index: int,
    selection: Selection | None,
    namespaces: Namespaces,
) -> Call:
    draws = SeededDraws(seed, index) if prepared.config.do_sample else None
    rows = [selection] * prepared.num_copies
    return build_call(engine, prepared, rows, draws=draws, outputs=False, namespaces=namespaces)


def _active_in_model(engine: PagedEngine, selection: Selection | None) -> AbstractContextManager[None]:
    return nullcontext() if engine.adapters is None else engine.entered(selection)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A function to call once a finished request."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="generate", unit="request") as bar:
        yield bar.update


def _run_all(engine: PagedEngine, calls: list[Call], advance: Callable[[], object]) -> None:
    """Runs the calls together and returns when all have ended, in whatever way."""

    def on_finish(call: Call) -> None:
        advance()

    for call in calls:
        engine.count_native()
        call.submitted_at = time.perf_counter()
        call.on_finish = on_finish
    engine.run_all(calls)


def _run_original(
    engine: PagedEngine,
    model: GenerativeModel,
    request: Request,
    config: GenerationConfig | None,
    kwargs: dict[str, Any],
    seed: int,
) -> GenerationResult:
    """One request on the original `generate()`, with random numbers of its own."""
    report_fallback(engine, request.reasons)
    start = time.perf_counter()
    length = len(request.token_ids)
    arguments = RequestPreparer(model, engine, kwargs).arguments(request.token_ids, config)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = type(model).generate(model, **arguments)
    except Exception as error:
        return GenerationResult([], str(FinishReason.ERROR), error, length)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    token_ids = sequences[0, length:].tolist()
    metrics = RequestMetrics(0.0, None, time.perf_counter() - start)
    return GenerationResult(token_ids, _finish_reason(request, token_ids), None, length, None, metrics)


def _finish_reason(request: Request, token_ids: list[int]) -> str:
    prepared = request.prepared
    if prepared is None or prepared.max_length is None:
        return str(FinishReason.STOP)
    eos = prepared.config._eos_token_tensor
    if eos is not None and token_ids and token_ids[-1] in eos.tolist():
        return str(FinishReason.STOP)
    full = len(request.token_ids) + len(token_ids) >= prepared.max_length
    return str(FinishReason.LENGTH if full else FinishReason.STOP)
