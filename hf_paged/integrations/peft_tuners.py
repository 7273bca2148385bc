"""Which of PEFT's tuners an engine step may run: those whose layers treat every token by itself.

A step packs tokens of many requests, so a layer whose result for one token depends on the others beside it would be
wrong without anybody noticing. Kinds are therefore listed, and one that is not, a newer PEFT's say, is a named
fallback. `tests/integrations/test_peft_table.py` runs each kind in each family.
"""

from __future__ import annotations

from typing import Any

#: How the tokens of an adapter get its share of a step.
GROUPED, BY_ADAPTER = "grouped", "by adapter"

#: Packages of `peft.tuners` whose layers treat each token by itself. Not among them: `lily` mixes its experts by the
#: mean over all tokens of a forward, `poly` wants a task a row, `shadow` and `adaption_prompt` change whole blocks.
_BY_TOKEN = frozenset(
    """
    adalora adamss beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 ln_tuning loha lokr lora miss oft
    osf peanut psoft pvera randlora road shira supertuning tinylora trainable_tokens unilora vblora vera waveft
    """.split()  # noqa: SIM905 - thirty names read better without quotes
)
#: Layers of such packages that are exceptions -> why.
_EXCEPTIONS = {
    "ParamWrapper": "LoRA of a parameter (target_parameters) replaces the weight while the layer runs",
    "MultiheadAttention": "LoRA of torch's MultiheadAttention looks at whole rows",
}
#: Kinds of LoRA that are computed from more than their own weights and the token -> why.
_VARIANTS = {"ArrowLinearVariant": "Arrow routes each token among other adapters of the model"}
_KNOWN_VARIANTS = (
    "ALora",  # refused where requests choose it, and by the hooks that it needs
    "BdLora",
    "Dora",
    "Kasa",
    "MiCA",
    "Monteclora",
    "QALora",
    "Velora",
)


def problem_with(layer: Any) -> str | None:
    """Why an adapter layer cannot run in a step; None where it can.

    Args:
        layer: a layer or wrapper of PEFT.
    """
    # Whose code runs, whatever the class is called.
    source = str(getattr(type(layer).forward, "__module__", ""))
    if source == "peft.utils.other":
        return None  # `modules_to_save` and trainable tokens: whole modules or rows of their own
    package = source.split(".")
    if package[:2] != ["peft", "tuners"] or package[2] not in _BY_TOKEN:
        return f"{type(layer).__module__}.{type(layer).__name__} is not known to treat each token by itself"
    name = next((cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in _EXCEPTIONS), None)
    if name is not None:
        return _EXCEPTIONS[name]
    for variant in {type(v).__name__ for v in vars(layer).get("lora_variant", {}).values()}:
        if variant in _VARIANTS or not variant.startswith(_KNOWN_VARIANTS):
            return _VARIANTS.get(variant, f"{variant} is not known to treat each token by itself")
    return None


def is_grouped(layer: Any, name: str) -> bool:
    """Whether `layer` adds adapter `name` by a low-rank product for each group of tokens, beside one base product."""
    from peft.tuners.lora import layer as lora

    plain = type(layer).forward in (lora.Linear.forward, lora.Embedding.forward)
    return plain and name not in layer.lora_variant
