"""From what a user passes to the one HuggingFace model inside: pipelines, PEFT, `torch.compile`, DDP, accelerate.

Wrappers are told by the names of their classes and the attributes they keep the inner model in, so that nothing is
imported that the user has not imported already. Knows no family: whether the model can be enabled is for
`hf_paged.patches.registry`.
"""

from __future__ import annotations

from typing import Any

from hf_paged.errors import UnsupportedModelError

__all__ = ["is_text_generation_pipeline", "lost_by_resolving", "resolve_model"]

_MODEL = "transformers.modeling_utils.PreTrainedModel"
#: Base class of a wrapper -> where it keeps what it wraps.
_WRAPPERS = {
    "transformers.pipelines.base.Pipeline": "model",
    "peft.peft_model.PeftModel": "base_model",
    "peft.mixed_model.PeftMixedModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
_MAX_DEPTH = 16  # wrappers around one model; more is a wrapper around itself


def resolve_model(obj: Any) -> Any:
    """The transformers `PreTrainedModel` that `obj` is or holds.

    Args:
        obj: a model, a pipeline, a PEFT model of any kind, a `torch.compile`, DDP, DataParallel, FSDP or DeepSpeed
            wrapper, or any nesting of them.

    Raises:
        UnsupportedModelError: there is none. The message names what was found.
    """
    inner = obj
    for _ in range(_MAX_DEPTH):
        names = _class_names(inner)
        if _MODEL in names:
            return inner
        attribute = next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
        if attribute is None or getattr(inner, attribute, None) is None:
            break
        inner = getattr(inner, attribute)
    kind = type(obj).__name__
    held = "" if inner is obj else f" around a {type(inner).__name__}"
    hint = " (a class: pass an instance)" if isinstance(obj, type) else ""
    raise UnsupportedModelError(
        f"{kind}{held} holds no transformers PreTrainedModel{hint}: pass a model, a text-generation pipeline, a "
        "PeftModel, or a torch.compile or data-parallel wrapper of one"
    )


def lost_by_resolving(obj: Any) -> str | None:
    """What the wrappers around the model add to its inputs, and a direct use of the inner model would leave out.

    `obj.generate(...)` is not concerned: the wrapper prepares the inputs before it calls the model's own `generate`.
    """
    for _ in range(_MAX_DEPTH):
        names = _class_names(obj)
        if _MODEL in names:
            return None
        attribute = next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
        if attribute is None:
            return None
        if "peft.peft_model.PeftModel" in names and getattr(
            obj.active_peft_config, "is_prompt_learning", False
        ):
            return f"{obj.active_peft_config.peft_type} puts virtual tokens before each prompt"
        obj = getattr(obj, attribute)
    return None


def is_text_generation_pipeline(obj: Any) -> bool:
    """Whether `obj` is transformers' pipeline for text generation, or of a class derived from it."""
    return "transformers.pipelines.text_generation.TextGenerationPipeline" in _class_names(obj)


def _class_names(obj: Any) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(obj).__mro__}
