"""Offline batches on Ray Data: `dataset.map_batches(RayGenerator, ...)`, each worker with its own model and engine.

    python -m hf_paged.server.ray_data ./my-checkpoint prompts.jsonl texts --max-new-tokens 64 --workers 2

Needs the extra `ray`; the class itself imports nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hf_paged.errors import ConfigError


class RayGenerator:
    """Adds to each batch of rows the texts that go on from their prompts.

        dataset.map_batches(
            RayGenerator,
            fn_constructor_args=("./my-checkpoint",),
            fn_constructor_kwargs={"max_new_tokens": 64},
            concurrency=2,
            batch_size=256,
        )

    All rows of a batch share one running batch, so large ones are faster.

    Args:
        source: a folder or hub id, of a model or a PEFT checkpoint; or a function that returns (model, tokenizer).
        prompts: the column with the prompts.
        output: the column for the texts.
        dtype, device: as for `hf-paged serve`; only with a folder or id.
        paged: keyword arguments of `hf_paged.enable`.
        options: of `generate`, the same for all rows.

    Raises:
        ConfigError: no tokenizer.
    """

    def __init__(
        self,
        source: str | Callable[[], tuple[Any, Any]],
        prompts: str = "prompt",
        output: str = "text",
        *,
        dtype: str | None = None,
        device: str | None = None,
        paged: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        import hf_paged
        from hf_paged.comparison.models import load_model

        tokenizer: Any
        if isinstance(source, str):
            loaded = load_model(source, dtype=dtype, device=device)
            self._model, tokenizer = loaded.model, loaded.tokenizer
        else:
            self._model, tokenizer = source()
        self._tokenizer = tokenizer
        if tokenizer is None:
            raise ConfigError(f"{source}: has no tokenizer, so it cannot be given text")
        self._prompts, self._output, self._options = prompts, output, options
        hf_paged.enable(self._model, **dict(paged or {}))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Args: batch: columns of equal length. Returns: the same with the column `output`.

        Raises:
            ConfigError: no column of prompts.
            Exception: what a row failed with.
        """
        import hf_paged

        if self._prompts not in batch:
            raise ConfigError(
                f"prompts={self._prompts!r}: no such column; there are {', '.join(sorted(batch))}"
            )
        ids = [self._tokenizer(str(prompt))["input_ids"] for prompt in batch[self._prompts]]
        results = hf_paged.generate_many(self._model, ids, **self._options)
        for result in results:
            if result.error is not None:
                raise result.error
        texts = [self._tokenizer.decode(result.token_ids, skip_special_tokens=True) for result in results]
        return {**batch, self._output: np.array(texts, dtype=object)}


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub id, of a model or of a PEFT checkpoint")],
    source: Annotated[Path, typer.Argument(help="JSON lines with a column of prompts")],
    target: Annotated[Path, typer.Argument(help="Folder for the same lines with their texts")],
    prompts: Annotated[str, typer.Option(help="The column with the prompts")] = "prompt",
    output: Annotated[str, typer.Option(help="The column for the texts")] = "text",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample by the checkpoint's own settings")] = False,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="Of each worker")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Generate for every line of a file."""
    import ray.data

    dataset = ray.data.read_json(str(source.resolve()))
    options = {"prompts": prompts, "output": output, "max_new_tokens": max_new_tokens, "do_sample": sample}
    dataset.map_batches(
        RayGenerator,
        fn_constructor_args=(model,),
        fn_constructor_kwargs=options,
        concurrency=workers,
        num_gpus=gpus,
        batch_size=batch_size,
    ).write_json(str(target.resolve()))


if __name__ == "__main__":
    typer.run(main)
