"""`hf-paged bench`: the speed figures of the project on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_paged.cli.common import quiet_libraries, split_names, usage_errors, writable

if TYPE_CHECKING:
    from hf_paged.comparison.bench import BenchResult


def bench(
    suite: Annotated[str, typer.Option(help="quick (6 minutes, indicative) or full (20 minutes)")] = "quick",
    output: Annotated[
        Path | None, typer.Option("--json", "--output", "-o", help="Write results as JSON")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the lines that --json has already")] = False,
    only: Annotated[str, typer.Option(help="Keys of lines, with commas; default: all")] = "",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu")] = None,
) -> None:
    """Measure hf_paged against transformers on random weights: ratios of paired runs, outputs checked equal."""
    with usage_errors():
        writable(output)
        from hf_paged.comparison.bench import run_suite
        from hf_paged.comparison.progress import terminal_progress

        quiet_libraries()
        with terminal_progress() as on_progress:
            results = run_suite(
                suite,
                path=output,
                resume=resume,
                only=split_names(only),
                device=device,
                on_progress=on_progress,
                on_line=_show,
            )
    if suite == "quick":
        typer.echo(
            "The quick suite is indicative: few requests, few repeats. `--suite full` is what the targets are for."
        )
    if not all(r.ok for r in results):
        raise typer.Exit(1)


def _show(result: BenchResult) -> None:
    data = result.data
    if data["skipped"]:
        typer.echo(f"{data['title']}: skipped, {data['skipped']}")
        return
    report = data["report"]
    rates = {a["name"]: _median([r["tokens_per_second"] for r in a["runs"]]) for a in report["arms"]}
    shown = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items() if rate is not None)
    equal = "tokens equal" if data["equal"] else "TOKENS DIFFER OR AN ARM FAILED"
    typer.echo(f"{data['title']}, {report['workload']['num_requests']} requests: {equal}; tokens/s: {shown}")
    for judgement in data["judgements"]:
        aim = f", aim {judgement['aim']:g}" if judgement["aim"] else ""
        wanted = f"must be ≥ {judgement['must']:g}{aim}"
        if "error" in judgement:
            typer.echo(f"  × {judgement['against']}: no ratio ({judgement['error']}); {wanted}")
            continue
        mark = "ok" if judgement["ok"] else "BELOW"
        typer.echo(
            f"  × {judgement['against']}: {judgement['median']:.2f} "
            f"({judgement['minimum']:.2f}–{judgement['maximum']:.2f} of {len(judgement['pairs'])}); {wanted}: {mark}"
        )
    for arm in report["arms"]:
        if arm["error"]:
            typer.echo(f"  {arm['name']} failed: {arm['error']}")


def _median(values: list[float]) -> float | None:
    import statistics

    return statistics.median(values) if values else None
