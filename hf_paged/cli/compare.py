"""`hf-paged compare`: the same requests through generate(), padded batches, generate_batch and hf_paged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_paged.cli.common import (
    fail,
    load_adapters,
    quiet_libraries,
    split_ints,
    split_names,
    split_numbers,
    terminal_width,
    usage_errors,
    writable,
)
from hf_paged.cli.report import show_all

if TYPE_CHECKING:
    from hf_paged.comparison.outputs import Outputs
    from hf_paged.comparison.report import CompareReport


def compare(
    model: Annotated[
        str, typer.Argument(help="Folder, hub id, or random weights: random:gpt2-124m, random:gpt2-5m")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or JSON lines with a prompt")
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            help="Kinds of traffic, with commas, or all: design, sharegpt, alpaca, azure-code, azure-chat, uniform, "
            "shared-prefix, rl-groups, single, poisson"
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths alone: design, sharegpt, alpaca, ...")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on all lengths of a scenario")] = None,
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
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for PNG plots; needs matplotlib")] = None,
    baseline: Annotated[Path | None, typer.Option(help="JSON of an earlier run to compare with")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each arm; default 3")] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Which, with commas: loop,padded,padded_budget,generate_batch,hf_paged,hf_paged_loop"
        ),
    ] = "",
    loop_subset: Annotated[int, typer.Option(min=1, help="Requests the loop is run on")] = 32,
    padded_subset: Annotated[int, typer.Option(min=1, help="Requests the padded arm is run on")] = 64,
    padded_sizes: Annotated[str, typer.Option(help="Batch sizes to choose the best of")] = "4,8,16,32",
    padded_orders: Annotated[str, typer.Option(help="dataset, prompt and oracle")] = "dataset,prompt",
    pool_rows: Annotated[
        str, typer.Option(help="Pool sizes of generate_batch to choose the best of")
    ] = "16,32,64",
    limits: Annotated[
        str, typer.Option(help="What a good request keeps, seconds: ttft, tpot, e2e")
    ] = "ttft:2,tpot:0.15",
    rates: Annotated[
        str, typer.Option(help="Poisson arrivals: requests a second, with commas; poisson chooses its own")
    ] = "",
    rate_requests: Annotated[int, typer.Option(min=2, help="Requests at each rate")] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Run every request to its limit")] = False,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts, samples and random weights")] = 0,
) -> None:
    """Compare hf_paged with what transformers offers, on one model: tokens, speed, latency, memory."""
    with usage_errors():
        for path in (output, html):
            writable(path)
        if sum(given is not None for given in (prompts, lengths, scenario)) > 1:
            fail("give one of --prompts, --lengths and --scenario, not both")
        options: dict[str, Any] = {
            "loop_subset": loop_subset,
            "padded_subset": padded_subset,
            "padded_sizes": split_ints("--padded-sizes", padded_sizes),
            "padded_orders": split_names(padded_orders),
            "pool_rows": split_ints("--pool-rows", pool_rows),
            "limits": _limits(limits),
            "rate_requests": rate_requests,
            "seed": seed,
        }
        # What a scenario has a word on is passed only where it was given.
        given = {"repeats": repeats, "arms": split_names(arms), "rates": split_numbers("--rates", rates)}
        options |= {name: value for name, value in given.items() if value}
        from hf_paged.comparison.outputs import Outputs

        reports = run(
            model,
            prompts,
            {"lengths": lengths, "num_requests": num_requests, "max_new_tokens": max_new_tokens}
            | {"ignore_eos": ignore_eos, "scale": scale, **options},
            scenarios=_scenarios(scenario),
            dtype=dtype,
            device=device,
            outputs=Outputs(output, html, plots, baseline),
            adapters=adapter or (),
        )
    # The tables show what failed; scripts see it here.
    if not all(r.complete and all(e.equal for e in r.equality if e.arm == "hf_paged") for r in reports):
        raise typer.Exit(1)


def run(
    spec: str,
    prompts: Path | None,
    arguments: dict[str, Any],
    *,
    scenarios: Sequence[str | None],
    dtype: str | None,
    device: str | None,
    outputs: Outputs,
    adapters: Sequence[str] = (),
) -> list[CompareReport]:
    """Loads the model and compares, scenario by scenario; the JSON is rewritten after every run, so nothing is lost.

    Raises:
        ValueError: a bad argument, file or model.
    """
    from hf_paged.comparison.lengths import find_distribution
    from hf_paged.comparison.workloads import read_prompts

    # What can be wrong is looked at before a model is loaded.
    rows = read_prompts(prompts) if prompts is not None else None
    if arguments["lengths"] is not None:
        find_distribution(arguments["lengths"])
    baseline = outputs.check()
    from hf_paged.comparison import compare as run_comparison
    from hf_paged.comparison.models import load_model
    from hf_paged.comparison.options import Options
    from hf_paged.comparison.reports import changes

    Options(**{k: v for k, v in arguments.items() if k in Options.__dataclass_fields__})
    quiet_libraries()
    loaded = load_model(spec, dtype=dtype, device=device, seed=arguments["seed"])
    load_adapters(loaded.model, adapters)
    reports: list[CompareReport] = []
    for scenario in scenarios:
        earlier = [r.to_dict() for r in reports]
        report = run_comparison(
            loaded.model,
            rows,
            tokenizer=loaded.tokenizer,
            name=spec,
            scenario=scenario,
            progress=True,
            on_update=_keeping(outputs, earlier),
            **arguments,
        )
        reports.append(report)
        typer.echo(_rendered(report))
    found = [r.to_dict() for r in reports]
    show_all(found, None if baseline is None else changes(baseline, found))
    for path in outputs.save(found, baseline):
        typer.echo(f"written: {path}")
    return reports


def _keeping(outputs: Outputs, earlier: list[dict[str, Any]]) -> Callable[[CompareReport], None]:
    """Writes the reports so far and the one under way."""
    return lambda report: outputs.save_json([*earlier, report.to_dict()])


def _scenarios(value: str | None) -> tuple[str | None, ...]:
    """The names of `--scenario`; None stands for none.

    Raises:
        ValueError: an unknown name.
    """
    if value is None:
        return (None,)
    from hf_paged.comparison.scenarios import SCENARIOS, find_scenario

    names = tuple(SCENARIOS) if value.strip() == "all" else split_names(value)
    if not names:
        raise ValueError(f"--scenario={value!r}: name at least one")
    for name in names:
        find_scenario(name)
    return names


def _limits(value: str) -> dict[str, float]:
    """ "ttft:2,tpot:0.15" as a dict.

    Raises:
        ValueError: a part is not NAME:SECONDS.
    """
    limits = {}
    for part in split_names(value):
        name, _, seconds = part.partition(":")
        try:
            limits[name.strip()] = float(seconds)
        except ValueError:
            raise ValueError(
                f"--limits={value!r}: must be NAME:SECONDS with commas, as in ttft:2,tpot:0.15"
            ) from None
    return limits


def _rendered(report: CompareReport) -> str:
    from hf_paged.comparison.tables import render

    return render(report, width=terminal_width())
