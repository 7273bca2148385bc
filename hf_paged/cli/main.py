"""`hf-paged`: the commands, one file each. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

from hf_paged.cli.bench import bench
from hf_paged.cli.compare import compare
from hf_paged.cli.env import env
from hf_paged.cli.generate import generate
from hf_paged.cli.report import report
from hf_paged.cli.run import SETTINGS, run
from hf_paged.cli.serve import serve

app = typer.Typer(
    name="hf-paged",
    help="Paged KV cache and continuous batching for HuggingFace Transformers models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(compare)
app.command()(report)
app.command()(bench)
app.command()(generate)
app.command()(serve)
app.command(context_settings=SETTINGS)(run)
app.command()(env)


if __name__ == "__main__":
    app()
