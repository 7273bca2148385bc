"""`ray_app`: the server as a Ray Serve application of several replicas, each a process with its own model and engine.

    serve run hf_paged.server.ray_serve:build model=./my-checkpoint min_replicas=1 max_replicas=4

Needs the extra `ray`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_paged.errors import ConfigError
from hf_paged.server.config import ServerConfig

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Of each answer: the replica that it came from.
SERVED_BY = b"x-served-by"
#: Requests that one replica works on before another is started, where there may be more: a batch that is well filled.
_TARGET_ONGOING = 32


def ray_app(
    source: str | Callable[[], tuple[Any, Any]],
    config: ServerConfig | None = None,
    *,
    replicas: int | tuple[int, int] = 1,
    adapters: Mapping[str, str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    paged: Mapping[str, Any] | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Application:
    """An application for `ray.serve.run`: the app of `create_app` in replicas, behind Ray's router.

    A replica whose engine does not work any more is replaced. What was running on it is lost, nothing else.

    Args:
        source: a folder or hub id, of a model or a PEFT checkpoint, that every node can reach; or a function, called
            in each replica, that returns (model, tokenizer).
        config: names and limits of each replica; `overrides` replace single fields.
        replicas: how many, or (least, most) of a number that follows the load.
        adapters: PEFT checkpoints by the name that requests give as `model`.
        dtype, device: as for `hf-paged serve`; only with a folder or id.
        paged: keyword arguments of `hf_paged.enable`.
        autoscaling: more fields of Ray's `AutoscalingConfig`, with (least, most) replicas.
        ray_actor_options: of each replica, `{"num_gpus": 1}` say.

    Raises:
        ConfigError: numbers of replicas that cannot be.
    """
    from ray import serve

    config = dataclasses.replace(config or ServerConfig(), **overrides)
    scaling = _scaling(replicas, autoscaling)
    kwargs: dict[str, Any] = {"adapters": dict(adapters or {}), "dtype": dtype, "device": device}

    def asgi_app() -> Any:
        return _build_app(source, config, paged=dict(paged or {}), **kwargs)

    class Server:
        """A replica."""

        app: Any

        async def check_health(self) -> None:
            trouble = await self.app.state.hf_paged.trouble()
            if trouble is not None:
                raise RuntimeError(trouble)

    deployment = serve.deployment(
        name="hf_paged",
        # Beyond it requests wait in the router, and beyond as many again they are turned away.
        max_ongoing_requests=config.max_sequences,
        max_queued_requests=config.max_sequences,
        graceful_shutdown_timeout_s=config.drain_timeout,
        ray_actor_options=dict(ray_actor_options or {}),
        **scaling,
    )
    return deployment(serve.ingress(asgi_app)(Server)).bind()


def build(args: Mapping[str, str]) -> Application:
    """For `serve run hf_paged.server.ray_serve:build model=... [key=value ...]`.

    Args:
        args: `model`, and if wanted `model_name`, `min_replicas`, `max_replicas`, `num_gpus`, `num_cpus`, `dtype`.

    Raises:
        ConfigError: an unknown key, no model, or a value that is no number where one is needed.
    """
    known = ("model", "model_name", "min_replicas", "max_replicas", "num_gpus", "num_cpus", "dtype")
    for name in args:
        if name not in known:
            raise ConfigError(f"{name}: unknown; known are {', '.join(known)}")
    if "model" not in args:
        raise ConfigError("model: missing: model=FOLDER_OR_ID")
    least = _number(args, "min_replicas", 1)
    most = _number(args, "max_replicas", least)
    return ray_app(
        args["model"],
        ServerConfig(model_names=(args.get("model_name", args["model"]),)),
        replicas=least if least == most else (least, most),
        dtype=args.get("dtype"),
        ray_actor_options={name: _number(args, name, 0) for name in ("num_gpus", "num_cpus") if name in args},
    )


def _number(args: Mapping[str, str], name: str, default: int) -> int:
    value = str(args.get(name, default))
    if not value.isascii() or not value.isdecimal():
        raise ConfigError(f"{name}={value!r}: must be a whole number")
    return int(value)


def _scaling(replicas: int | tuple[int, int], autoscaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a deployment that say how many replicas it has."""
    numbers = replicas if isinstance(replicas, tuple) else (replicas,)
    right = len(numbers) in (1, 2) and all(type(number) is int for number in numbers)
    if not right or numbers[-1] < 1 or not 0 <= numbers[0] <= numbers[-1]:
        raise ConfigError(f"replicas={replicas!r}: must be an int of at least 1, or (least, most)")
    if len(numbers) == 1:
        if autoscaling is not None:
            raise ConfigError(f"autoscaling={autoscaling!r}: only with replicas=(least, most)")
        return {"num_replicas": numbers[0]}
    limits = {
        "min_replicas": numbers[0],
        "max_replicas": numbers[1],
        "target_ongoing_requests": _TARGET_ONGOING,
    }
    return {"autoscaling_config": limits | dict(autoscaling or {})}


def _build_app(
    source: str | Callable[[], tuple[Any, Any]],
    config: ServerConfig,
    *,
    adapters: dict[str, str],
    dtype: str | None,
    device: str | None,
    paged: dict[str, Any],
) -> Any:
    """The app of one replica, in its process."""
    import hf_paged
    from hf_paged.comparison.models import load_model
    from hf_paged.integrations.peft_checkpoints import load_adapter
    from hf_paged.server.app import create_app

    if isinstance(source, str):
        loaded = load_model(source, dtype=dtype, device=device)
        model, tokenizer = loaded.model, loaded.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{source}: has no tokenizer, so it cannot be given text")
    else:
        model, tokenizer = source()
    hf_paged.enable(model, **paged)
    # The names of the base model keep meaning what it is before these are loaded.
    app = create_app(model, tokenizer, config)
    for name, path in adapters.items():
        load_adapter(model, path, name)
    app.add_middleware(_ServedBy)
    return app


class _ServedBy:
    """Says in each answer which replica it came from."""

    def __init__(self, app: ASGIApp) -> None:
        from ray import serve

        self._app = app
        self._name = serve.get_replica_context().replica_id.to_full_id_str().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (SERVED_BY, self._name)]
            await send(message)

        await self._app(scope, receive, named)
