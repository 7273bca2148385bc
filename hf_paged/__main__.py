"""`python -m hf_paged` is `hf-paged`."""

from __future__ import annotations

from hf_paged.cli.main import app

app(prog_name="hf-paged")
