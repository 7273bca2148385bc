"""`hf-paged run`: any Python script, with every supported model it makes enabled."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

import hf_paged

#: Everything after SCRIPT is the script's, options included.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file, or with -m a module; then its own arguments")],
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m")
    ] = False,
) -> None:
    """Run a Python script with every supported model it makes enabled.

    Nothing in the script is changed: each model is enabled at its first generate, generate_batch or pipeline call. Ends
    with one line on standard error: what was served natively, and what was not and why. HF_PAGED_DISABLE=1 turns it all
    off. The script's exit code, output and exceptions are its own. Processes it starts are not covered.
    """
    from hf_paged.integrations.process_wide import ProcessWide

    disabled = os.environ.get("HF_PAGED_DISABLE", "") not in ("", "0")
    process = ProcessWide(lambda obj: hf_paged.enable(obj))
    if not disabled:
        process.install()
    pid = os.getpid()
    try:
        _execute(script, context.args, is_module=module)
    finally:
        if os.getpid() == pid:  # a forked child that comes out here is none of ours
            line = "hf_paged: HF_PAGED_DISABLE is set: nothing was enabled" if disabled else process.summary()
            sys.stdout.flush()
            print(line, file=sys.stderr)


def _execute(script: str, arguments: list[str], *, is_module: bool) -> None:
    """Runs it as `python` would: the same `sys.argv`, `sys.path[0]`, tracebacks and exit codes."""
    sys.argv = [script, *arguments]
    try:
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            raise
        print(end.code, file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell reports for python after Ctrl-C
    except BaseException as error:
        shown = error.with_traceback(_from_the_script_on(error.__traceback__))
        sys.excepthook(type(shown), shown, shown.__traceback__)
        raise SystemExit(1) from None


def _from_the_script_on(frames: TracebackType | None) -> TracebackType | None:
    """Leaves out the frames of this file and of runpy, which `python` would not show."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while frames is not None and traceback.extract_tb(frames, 1)[0].filename in ours:
        frames = frames.tb_next
    return frames
