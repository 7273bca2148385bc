"""`model.generate()` of an enabled model: prepared by upstream, decoded by the engine or else by upstream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_paged.engine.beam_choice import EntangledBeams
from hf_paged.engine.draws import default_generator
from hf_paged.generation.adapters import chosen_rows, select_rows
from hf_paged.generation.attended import ended_on_error, run_in_lockstep, run_streamed
from hf_paged.generation.checks import early_reasons, late_reasons
from hf_paged.generation.fallback import Explanation, FallbackReason, reason, report_fallback
from hf_paged.generation.outputs import assemble, num_steps
from hf_paged.generation.prepared import Prepared, argument, prepare
from hf_paged.generation.quiet import quiet
from hf_paged.generation.requests import build_call
from hf_paged.generation.returned_cache import fill_pending
from hf_paged.generation.view import GenerativeModel, HubDecodingMode, make_view

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

#: What users give by position.
_POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
)
#: Early reasons after which upstream's preparation is not the one that would run, or does work of its own.
_NO_PREPARATION = frozenset({"foreign_generate", "custom_generate", "cache_implementation"})


def paged_generate(
    model: GenerativeModel, replaced: Any, engine: PagedEngine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Serves `model.generate(*args, **kwargs)`.

    Args:
        model: the enabled model.
        replaced: the `generate` the instance had before it was enabled; None where it had the one of its
            class. engine: the engine of `model`. args, kwargs: as the user gave them.

    Returns:
        What the original returns: [rows, length] int64 or a `ModelOutput`.

    Raises:
        FallbackError: the call has a reason to fall back and the config forbids that; nothing ran then.
        Exception: whatever upstream raises for these arguments.
    """
    if kwargs.get("adapter_names") is not None and engine.adapters is not None:
        names = kwargs["adapter_names"]
        kwargs = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        with chosen_rows(model, names):
            return paged_generate(model, replaced, engine, args, kwargs)
    original = replaced if replaced is not None else type(model).generate.__get__(model)
    if is_ours(argument(model, args, kwargs, "custom_generate")):
        return original(*args, **kwargs)  # it comes back through `custom_generate`
    with ended_on_error(argument(model, args, kwargs, "streamer")):
        return _generate(model, replaced, original, engine, args, kwargs)


def _generate(
    model: GenerativeModel,
    replaced: Any,
    original: Callable[..., Any],
    engine: PagedEngine,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    reasons = early_reasons(model, replaced, engine, args, kwargs)
    if reasons:
        with engine.shortening:  # what another thread's early exit does to the model is no reason
            reasons = early_reasons(model, replaced, engine, args, kwargs)
    if reasons:
        if engine.config.forbids_fallback:
            reasons += _reasons_after(model, engine, reasons, args, kwargs)
        report_fallback(engine, reasons)
        return original(*args, **kwargs)

    def decode(method: str, /, *loop_args: Any, **loop_kwargs: Any) -> Any:
        prepared = Prepared.of(method, *loop_args, **loop_kwargs)
        prepared.user_cache = kwargs.get("past_key_values")
        return _decode(model, engine, prepared)

    view = make_view(model, decode)
    try:
        return type(view).generate(view, *args, **kwargs)
    except HubDecodingMode as mode:
        report_fallback(engine, [reason("hub_decoding", str(mode))])
        return original(*args, **kwargs)


def custom_generate(
    model: GenerativeModel, engine: PagedEngine, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Serves a decoding loop for `generate(..., custom_generate=hf_paged.generate)`.

    Args:
        args, kwargs: what upstream hands a custom function, without the model.

    Raises:
        ValueError: the mode has no decoding loop in transformers.
    """
    config = kwargs["generation_config"]
    method = GENERATION_MODES_MAPPING[config.get_generation_mode()]
    if "/" in method:
        raise ValueError(f"custom_generate=hf_paged.generate: this decoding mode lives on the hub ({method})")
    prepared = Prepared.of(method, *args, **kwargs)
    early = early_reasons(model, None, engine, (), {})
    return _decode(model, engine, prepared, early)


_INT8_NOTE = "kv_cache_dtype='int8' rounds keys and values: results are near those of generate(), not equal"


def explain_call(
    model: GenerativeModel, engine: PagedEngine, kwargs: Mapping[str, Any], replaced: Any = None
) -> Explanation:
    """Whether `model.generate(**kwargs)` would be native, and all reasons why not.

    Runs upstream's preparation silently: no warning, no streamer, no random number, no counter.

    Args:
        replaced: the `generate` the instance had before it was enabled; None where it had its class's.

    Raises:
        Exception: whatever upstream raises while it prepares these arguments.
    """
    given = dict(kwargs)
    given.pop("adapter_names", None)  # native whatever they are
    if is_ours(given.get("custom_generate")):
        del given["custom_generate"]
    reasons = early_reasons(model, replaced, engine, (), given)
    reasons += _reasons_after(model, engine, reasons, (), given)
    paths = {} if engine.adapters is None else engine.adapters.paths()
    if reasons:
        return Explanation(False, tuple(dict.fromkeys(reasons)), adapters=dict.fromkeys(paths, "original"))
    notes = (_INT8_NOTE,) if engine.config.kv_cache_dtype == "int8" else ()
    return Explanation(True, notes=notes, adapters=paths)


def is_ours(function: Any) -> bool:
    """Whether `function` is `hf_paged.generate`."""
    name = (getattr(function, "__module__", None), getattr(function, "__qualname__", None))
    return name == ("hf_paged.api", "generate")


def _decode(
    model: GenerativeModel, engine: PagedEngine, prepared: Prepared, early: Sequence[FallbackReason] = ()
) -> Any:
    # First of all: the model may have another dtype now than the blocks that are still kept.
    fill_pending(engine)
    reasons = [*early, *late_reasons(model, engine, prepared, attended=True)]
    if reasons:
        report_fallback(engine, reasons)
        return _run_fallback(model, engine, prepared)
    generator = default_generator(prepared.input_ids.device) if prepared.config.do_sample else None
    state = None if generator is None else generator.get_state()
    try:
        return _run(model, engine, prepared)
    except EntangledBeams:
        engine.counters.native_calls -= 1  # it was not one after all
        if generator is not None and state is not None:
            generator.set_state(state)
        report_fallback(
            engine, [reason("beam_search", "a prompt has no beam to go on with before others are done")]
        )
        return prepared.run_upstream(model)


def _run_fallback(model: GenerativeModel, engine: PagedEngine, prepared: Prepared) -> Any:
    """Upstream's loop. `assistant_early_exit` shortens the model by its config while it drafts, and does not undo that
    where it raises: no step of the engine may run meanwhile, or it would use the first layers only.
    """
    if prepared.config.assistant_early_exit is None:
        return prepared.run_upstream(model)
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    with nullcontext() if engine.is_paused_here else engine.paused(), engine.shortening:
        try:
            return prepared.run_upstream(model)
        finally:
            config.num_hidden_layers = layers


def _run(model: GenerativeModel, engine: PagedEngine, prepared: Prepared) -> Any:
    call = build_call(engine, prepared, select_rows(engine, prepared))
    if prepared.config.compile_config is not None:
        # Never met with a dynamic cache: upstream says so, as here, and goes on.
        model._valid_auto_compile_criteria(prepared.model_kwargs, prepared.config)
    engine.count_native()
    try:
        records = None
        if call.lockstep is not None:
            records = run_in_lockstep(engine, prepared, call)
        elif prepared.streamer is not None and call.sampling.beams is None:
            run_streamed(engine, prepared, call)
        else:
            engine.run(call)
        output = assemble(engine, prepared, call, records)
        if prepared.streamer is not None:
            prepared.streamer.end()
        return output
    except BaseException:
        if call.keep_kv:
            engine.release_kv(call)
        raise
    finally:
        draws = call.sampling.draws
        if draws is not None:
            draws.finish(num_steps(call))


def _reasons_after(
    model: GenerativeModel,
    engine: PagedEngine,
    early: Sequence[FallbackReason],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[FallbackReason]:
    """The late reasons of a call that is not to run, those of `early` left out."""
    codes = {r.code for r in early}
    if codes & _NO_PREPARATION or "disabled" in codes:
        return []
    if args:
        kwargs = {n: argument(model, args, kwargs, n) for n in _POSITIONAL} | dict(kwargs)
    fill_pending(engine)
    looked_at = dict(kwargs)
    if looked_at.get("streamer") is not None:
        looked_at["streamer"] = _Deaf()
    try:
        with quiet():
            prepared = prepare(model, (), looked_at)
    except HubDecodingMode as mode:
        return [reason("hub_decoding", str(mode))]
    return [r for r in late_reasons(model, engine, prepared, attended=True) if r.code not in codes]


class _Deaf:
    """Stands for the user's streamer where upstream prepares only to be looked at: it puts the prompt."""

    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass
