"""`hf-paged compare`: the same requests through generate(), padded batches, generate_batch and hf_paged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_paged.cli.common import (
    fail,
    load_adapters,
    quiet_libraries,
    split_ints,
    split_names,
    usage_errors,
    writable,
)

if TYPE_CHECKING:
    from hf_paged.comparison.report import CompareReport


def compare(
    model: Annotated[
        str, typer.Argument(help="Folder, hub id, or random weights: random:gpt2-124m, random:gpt2-5m")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or JSON lines with a prompt")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="design, sharegpt, alpaca or uniform: lengths to draw")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests to draw")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of prompts that bring none")] = 128,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a PEFT adapter, many times: all are loaded, the first one runs"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--json", "-o", help="Write the report as JSON")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each arm")] = 3,
    arms: Annotated[str, typer.Option(help="Which, with commas")] = "loop,padded,generate_batch,hf_paged",
    loop_subset: Annotated[int, typer.Option(min=1, help="Requests the loop is run on")] = 32,
    padded_subset: Annotated[int, typer.Option(min=1, help="Requests the padded arm is run on")] = 64,
    padded_sizes: Annotated[str, typer.Option(help="Batch sizes to choose the best of")] = "4,8,16,32",
    padded_orders: Annotated[str, typer.Option(help="dataset, prompt and oracle")] = "dataset,prompt",
    pool_rows: Annotated[
        str, typer.Option(help="Pool sizes of generate_batch to choose the best of")
    ] = "16,32,64",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Run every request to its limit")] = False,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts, samples and random weights")] = 0,
) -> None:
    """Compare hf_paged with what transformers offers, on one model: tokens, speed, first token, memory."""
    with usage_errors():
        writable(output)
        sizes, rows = split_ints("--padded-sizes", padded_sizes), split_ints("--pool-rows", pool_rows)
        if prompts is not None and lengths is not None:
            fail("give --prompts or --lengths, not both")
        options: dict[str, Any] = {
            "arms": split_names(arms),
            "repeats": repeats,
            "loop_subset": loop_subset,
            "padded_subset": padded_subset,
            "padded_sizes": sizes,
            "padded_orders": split_names(padded_orders),
            "pool_rows": rows,
            "seed": seed,
        }
        report = run(
            model,
            prompts,
            {"lengths": lengths, "num_requests": num_requests, "max_new_tokens": max_new_tokens}
            | {"ignore_eos": ignore_eos, **options},
            dtype=dtype,
            device=device,
            output=output,
            adapters=adapter or (),
        )
    typer.echo(_rendered(report))
    if output is not None:
        typer.echo(f"written: {output}")
    # The table shows what failed; scripts see it here.
    if not report.complete or not all(e.equal for e in report.equality if e.arm == "hf_paged"):
        raise typer.Exit(1)


def run(
    spec: str,
    prompts: Path | None,
    arguments: dict[str, Any],
    *,
    dtype: str | None,
    device: str | None,
    output: Path | None,
    adapters: Sequence[str] = (),
) -> CompareReport:
    """Loads the model and compares; the JSON is rewritten after every run, so that nothing is lost.

    Raises:
        ValueError: a bad argument, file or model.
    """
    from hf_paged.comparison.lengths import find_distribution
    from hf_paged.comparison.workloads import read_prompts

    # What can be wrong is looked at before a model is loaded.
    rows = read_prompts(prompts) if prompts is not None else None
    if arguments["lengths"] is not None:
        find_distribution(arguments["lengths"])
    from hf_paged.comparison import compare as run_comparison
    from hf_paged.comparison.models import load_model
    from hf_paged.comparison.options import Options

    Options(**{k: v for k, v in arguments.items() if k in Options.__dataclass_fields__})
    quiet_libraries()
    loaded = load_model(spec, dtype=dtype, device=device, seed=arguments["seed"])
    load_adapters(loaded.model, adapters)
    return run_comparison(
        loaded.model,
        rows,
        tokenizer=loaded.tokenizer,
        name=spec,
        progress=True,
        on_update=(lambda report: report.save(output)) if output is not None else None,
        **arguments,
    )


def _rendered(report: CompareReport) -> str:
    import shutil

    from hf_paged.comparison.tables import render

    return render(report, width=max(shutil.get_terminal_size().columns, 100))
