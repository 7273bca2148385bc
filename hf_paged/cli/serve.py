"""`hf-paged serve`: an OpenAI-compatible server for a checkpoint."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_paged.cli.common import fail, load_adapters, quiet_libraries, usage_errors


def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub id, of a model or of a PEFT checkpoint")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a PEFT adapter, many times; requests choose it by `model`"),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one")] = 8000,
    model_name: Annotated[
        list[str] | None, typer.Option(help="What `model` of a request may say; default: MODEL as given")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one key a line; every route but /health then needs one")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A jinja file in place of the model's own")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help='Most KV memory, "2GiB" say')] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help='"auto", or "int8" for less memory')] = "auto",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences in one step")] = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in one step")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Tokens of a request")] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Running and waiting; beyond: 429")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of all of them; beyond: 429")] = 2**20,
    max_connections: Annotated[int, typer.Option(min=1)] = 4096,
    max_events_per_second: Annotated[
        int, typer.Option(min=1, help="Of all streams together; beyond, tokens share an event")
    ] = 1000,
    request_timeout: Annotated[float, typer.Option(help="Seconds a request may take")] = 600.0,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds to the first token")] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for running requests after SIGTERM")] = 30.0,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Lets clients load adapters at run time from folders below this one")
    ] = None,
    allow_priority: Annotated[bool, typer.Option("--allow-priority", help="Take `priority`")] = False,
    cors_origin: Annotated[list[str] | None, typer.Option(help="For browsers; many times")] = None,
    vllm_metric_names: Annotated[bool, typer.Option("--vllm-metric-names")] = False,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug")] = "info",
) -> None:
    """Serve a model over OpenAI's protocol."""
    try:
        from hf_paged.server.config import ServerConfig
        from hf_paged.server.serve import make_server, run
    except ImportError as error:
        fail(f"{error.name} is not installed: pip install 'hf-paged[serve]'")
    with usage_errors():
        config = ServerConfig(
            model_names=tuple(model_name or [model]),
            api_keys=read_keys(api_key_file),
            max_model_len=max_model_len,
            max_sequences=max_sequences,
            max_prompt_tokens=max_prompt_tokens,
            max_events_per_second=max_events_per_second,
            request_timeout=request_timeout,
            queue_timeout=queue_timeout,
            drain_timeout=drain_timeout,
            adapter_root=adapter_root,
            allow_priority=allow_priority,
            cors_origins=tuple(cors_origin or ()),
            vllm_metric_names=vllm_metric_names,
        )
        app = make_app(
            model,
            config,
            adapters=adapter or [],
            chat_template=chat_template,
            dtype=dtype,
            device=device,
            paged={
                "kv_cache_memory": kv_cache_memory,
                "kv_cache_dtype": kv_cache_dtype,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
            },
        )
        server = make_server(
            app, config, host=host, port=port, log_level=log_level, max_connections=max_connections
        )
    if not config.api_keys and not _is_loopback(host):
        typer.echo(f"warning: anybody who reaches {host} can use this server: no --api-key-file", err=True)
    run(server)


def make_app(
    spec: str,
    config: Any,
    *,
    adapters: list[str],
    chat_template: Path | None,
    dtype: str | None,
    device: str | None,
    paged: dict[str, Any],
) -> Any:
    """The app for a checkpoint.

    Raises:
        ValueError: a model, tokenizer or adapter that cannot be loaded, or is not supported.
    """
    import hf_paged
    from hf_paged.comparison.models import load_model
    from hf_paged.server import create_app

    quiet_libraries()
    loaded = load_model(spec, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{spec}: has no tokenizer, so it cannot be given text")
    if chat_template is not None:
        loaded.tokenizer.chat_template = chat_template.read_text()
    try:
        hf_paged.enable(loaded.model, **paged)
    except hf_paged.UnsupportedModelError as error:
        raise ValueError(str(error)) from None
    # The names of the base model keep meaning what it is before these are loaded.
    app = create_app(loaded.model, loaded.tokenizer, config)
    load_adapters(loaded.model, adapters, activate=False)
    return app


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that are empty or begin with # are none.

    Raises:
        ValueError: the file cannot be read or holds none.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path}: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"--api-key-file {path}: holds no key")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
