"""`hf_paged.compare`: the A/B comparison as a function."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hf_paged
from hf_paged.comparison.arms import ArmContext, position_limit
from hf_paged.comparison.options import Options
from hf_paged.comparison.report import CompareReport
from hf_paged.comparison.runner import OnProgress, Runner
from hf_paged.comparison.scenarios import Scenario, find_scenario
from hf_paged.comparison.workloads import Workload, fit, workload_from_lengths, workload_from_prompts
from hf_paged.resolve import resolve_model


def compare(
    model: Any,
    prompts: Sequence[Any] | Workload | None = None,
    *,
    tokenizer: Any = None,
    lengths: str | None = None,
    scenario: str | None = None,
    scale: float | None = None,
    num_requests: int = 64,
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
    config: Any = None,
    name: str | None = None,
    progress: bool | OnProgress = False,
    on_update: Callable[[CompareReport], None] | None = None,
    **options: Any,
) -> CompareReport:
    """Runs the same requests through generate(), padded batches, generate_batch and hf_paged, and compares.

    All arms decode greedily, obey the limits of each request and stop at the model's EOS. The model must not
    be enabled; it is left as it was.

    Args:
        model: a causal language model, or a pipeline or wrapper that holds one.
        prompts: texts, lists or tensors of token ids, or a `Workload`; None draws them from `lengths`.
        tokenizer: for prompts that are text; a pipeline brings its own.
        lengths: a name of `hf_paged.comparison.lengths.DISTRIBUTIONS`: prompt and output lengths to draw. Without
            `prompts`, `lengths` and `scenario` it is "design".
        scenario: a name of `hf_paged.comparison.scenarios.SCENARIOS`: lengths, what prompts have in common, and
            arrivals. It brings defaults for options that are not given.
        scale: factor on all lengths of a scenario; None is 1, or what its own rule makes fit the model.
        num_requests: how many to draw.
        max_new_tokens: limit of each of `prompts`.
        ignore_eos: run every request to its limit.
        config: the `PagedConfig` of the hf_paged arm.
        name: what the report calls the model.
        progress: True for a bar on the terminal, or a function of (label, done, total).
        on_update: called with the unfinished report after every run.
        **options: fields of `hf_paged.comparison.runner.Options`: arms, repeats, loop_subset, padded_subset,
            padded_sizes, padded_orders, pool_rows, calibration_subset, limits, rates, rate_fractions,
            rate_requests, seed.

    Returns:
        The report. `print(report)` shows it, `report.save(path)` writes JSON.

    Raises:
        ValueError: a bad argument, or a model that is enabled already.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)  # a pipeline brings its own
    model = resolve_model(model)
    if hf_paged.is_enabled(model):
        raise ValueError("compare needs the plain model: call hf_paged.disable(model) first")
    found = None if scenario is None else find_scenario(scenario)
    try:
        chosen = Options(**({} if found is None else found.options) | options)
    except TypeError as error:
        raise ValueError(str(error).replace("Options.__init__() ", "")) from None
    if scale is not None and found is None:
        raise ValueError(f"scale={scale}: it belongs to a scenario, and none is named")
    if found is not None:
        if prompts is not None or lengths is not None:
            raise ValueError("give a scenario, prompts or lengths, not several of them")
        workload = _draw(found, model, tokenizer, num_requests, chosen.seed, scale)
    else:
        workload = make_workload(
            model, prompts, tokenizer, lengths, num_requests, max_new_tokens, seed=chosen.seed
        )
    eos_ids = () if ignore_eos else eos_ids_of(model)
    pad_id = next((i for i in (model.generation_config.pad_token_id, *eos_ids) if i is not None), 0)
    context = ArmContext(model, workload.requests, eos_ids, pad_id, chosen.seed)
    report = CompareReport(
        model=describe_model(model, name),
        workload=workload.describe() | {"eos_ids": list(eos_ids)},
        options={**vars(chosen), "decoding": "greedy"},
        environment=environment(),
        scenario=None if found is None else found.describe(),
    )
    with _progress_bar(progress) as on_progress, plain_defaults(model, eos_ids, pad_id):
        Runner(context, chosen, report, config, on_progress, on_update).run()
    return report


def make_workload(
    model: Any,
    prompts: Any,
    tokenizer: Any,
    lengths: str | None,
    num_requests: int,
    max_new_tokens: int,
    *,
    seed: int,
) -> Workload:
    """The workload `compare` is asked for, cut to the model's positions.

    Raises:
        ValueError: both prompts and lengths, a bad prompt, an unknown distribution, or a limit below 1.
    """
    if prompts is not None and lengths is not None:
        raise ValueError("give prompts or lengths, not both")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    text_config = model.config.get_text_config()
    positions = position_limit(model)
    if isinstance(prompts, Workload):
        return fit(prompts, positions)
    if prompts is not None:
        return fit(
            workload_from_prompts(prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens), positions
        )
    return workload_from_lengths(
        lengths or "design",
        num_requests,
        vocab_size=text_config.vocab_size,
        max_positions=positions,
        seed=seed,
        tokenizer=tokenizer,
        special_ids=eos_ids_of(model),
    )


def _draw(
    scenario: Scenario, model: Any, tokenizer: Any, num_requests: int, seed: int, scale: float | None
) -> Workload:
    return scenario.draw(
        num_requests,
        vocab_size=model.config.get_text_config().vocab_size,
        max_positions=position_limit(model),
        seed=seed,
        tokenizer=tokenizer,
        special_ids=eos_ids_of(model),
        scale=scale,
    )


def eos_ids_of(model: Any) -> tuple[int, ...]:
    """The ids that end a text of this model."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


@contextlib.contextmanager
def plain_defaults(model: Any, eos_ids: tuple[int, ...], pad_id: int) -> Iterator[None]:
    """Gives the model greedy defaults and eval mode for a while.

    A checkpoint may ship sampling options; each arm merges them in its own way, so none may be there.
    """
    from transformers import GenerationConfig

    kept, training = model.generation_config, model.training
    model.generation_config = GenerationConfig(eos_token_id=list(eos_ids) or None, pad_token_id=pad_id)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(training)


def describe_model(model: Any, name: str | None) -> dict[str, Any]:
    """What the report says about the model."""
    return {
        "name": name or model.config._name_or_path or type(model).__name__,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
    }


def environment() -> dict[str, Any]:
    """The environment block of reports."""
    return importlib.import_module("hf_paged._env").environment()


@contextlib.contextmanager
def _progress_bar(progress: bool | OnProgress) -> Iterator[OnProgress | None]:
    if callable(progress) or not progress:
        yield progress or None
        return
    from hf_paged.comparison.progress import terminal_progress

    with terminal_progress() as on_progress:
        yield on_progress
