"""`hf-paged generate`: texts for prompts, from the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hf_paged.cli.common import fail, load_adapters, quiet_libraries, usage_errors


def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample; 0 or nothing is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same samples")] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Texts for each prompt")] = 1,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a PEFT adapter, many times; or __base__. Each prompt runs with each of them"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu")] = None,
) -> None:
    """Generate text with hf_paged and say how fast it was."""
    if any(not p for p in prompts):
        fail("a prompt is empty")
    sampled = bool(temperature) or top_p is not None or top_k is not None
    if num_return_sequences > 1 and not sampled:
        fail("--num-return-sequences needs sampling: give --temperature, --top-p or --top-k")
    options: dict[str, Any] = {"do_sample": sampled, "num_return_sequences": num_return_sequences}
    if sampled:
        given = {"temperature": temperature or None, "top_p": top_p, "top_k": top_k}
        options |= {k: v for k, v in given.items() if v is not None}
    with usage_errors():
        texts, tokens, seconds, notes = run(
            model,
            prompts,
            options | {"max_new_tokens": max_new_tokens},
            adapters=adapter or (),
            dtype=dtype,
            device=device,
            seed=seed,
        )
    titles = [
        f"[{number}] {prompt}" + (f"  ({name.partition('=')[0]})" if name else "")
        for number, prompt in enumerate(prompts, start=1)
        for name in adapter or [""]
        for _ in range(num_return_sequences)
    ]
    for title, text in zip(titles, texts, strict=True):
        if len(texts) > 1:
            typer.secho(title, bold=True)
        typer.echo(text)
    for note in notes:
        typer.echo(note, err=True)
    typer.echo(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", err=True)


def run(
    spec: str,
    prompts: list[str],
    options: dict[str, Any],
    *,
    adapters: Sequence[str] = (),
    dtype: str | None,
    device: str | None,
    seed: int | None,
) -> tuple[list[str], int, float, list[str]]:
    """Texts, the number of new tokens, the seconds it took, and notes on what was not native.

    Raises:
        ValueError: a model that cannot be loaded, has no tokenizer or is of no supported family.
    """
    import torch

    import hf_paged
    from hf_paged.comparison.arms import cut_at_limit
    from hf_paged.comparison.models import load_model

    quiet_libraries()
    loaded = load_model(spec, dtype=dtype, device=device)
    tokenizer, model = loaded.tokenizer, loaded.model
    if tokenizer is None:
        raise ValueError(f"{spec}: has no tokenizer, so it cannot be given text")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    names = load_adapters(model, adapters)
    if names:
        options = options | {"adapter_names": names * len(prompts)}
        prompts = [prompt for prompt in prompts for _ in names]
    batch = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(model.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if seed is not None:
        torch.manual_seed(seed)
    try:
        hf_paged.enable(model)
    except hf_paged.UnsupportedModelError as error:
        raise ValueError(str(error)) from None
    started = time.perf_counter()
    out = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    seconds = time.perf_counter() - started
    eos = model.generation_config.eos_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    rows = [
        cut_at_limit(row, options["max_new_tokens"], eos_ids)
        for row in out[:, inputs["input_ids"].shape[1] :].tolist()
    ]
    fallbacks = hf_paged.stats(model).fallback_calls
    notes = [f"not native ({reason}): transformers' own generate ran" for reason in fallbacks]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    hf_paged.disable(model)
    return texts, sum(map(len, rows)), seconds, notes
