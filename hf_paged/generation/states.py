"""`output_hidden_states` and `output_attentions`: what of them a call records, and how upstream hands it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils import output_capturing

from hf_paged.engine import states
from hf_paged.engine.states import Columns, StateRecord
from hf_paged.generation.fallback import FallbackReason, reason
from hf_paged.generation.prepared import Prepared

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call

#: Attention implementations that give no weights: upstream's tuples are then empty.
_WITHOUT_WEIGHTS = "sdpa"


def state_reasons(engine: PagedEngine, prepared: Prepared) -> Iterator[FallbackReason]:
    """Why the inner states of a call cannot be told as upstream would."""
    config = prepared.config
    wanted = config.output_hidden_states
    if config.return_dict_in_generate and wanted and wanted is not True and not selects_layers():
        yield reason("unknown_option", f"output_hidden_states={wanted!r}")
    if not (config.output_attentions and config.return_dict_in_generate):
        return
    attention = _attention(engine)
    if attention not in ("eager", _WITHOUT_WEIGHTS):
        yield reason("output_attentions", f"with {attention}")
    elif engine.config.deterministic and attention == "eager":
        yield reason("output_attentions", "their last bit depends on the batch: not with deterministic=True")
    elif attention == _WITHOUT_WEIGHTS and prepared.method == "_assisted_decoding":
        yield reason("output_attentions", "there are none to take apart: upstream's error")


def state_record(engine: PagedEngine, prepared: Prepared) -> StateRecord | None:
    """What the engine should record for a call whose outputs are wanted; None for nothing."""
    config = prepared.config
    hidden = bool(config.output_hidden_states)
    attentions = bool(config.output_attentions) and _attention(engine) == "eager"
    return StateRecord(hidden, attentions) if hidden or attentions else None


def state_fields(prepared: Prepared, call: Call, num_steps: int) -> dict[str, Any]:
    """The fields `hidden_states` and `attentions` of what `generate()` returns for a call that has ended."""
    config = prepared.config
    columns = _columns(prepared, call, num_steps)
    record: StateRecord | None = call.states
    hidden: Any = None
    attentions: Any = None
    if config.output_hidden_states:
        recorded = states.hidden_states_of(call, columns)
        hidden = tuple(_selected(config.output_hidden_states, layers) for layers in recorded)
    if config.output_attentions:
        seen = record is not None and record.attentions
        attentions = states.attentions_of(call, columns) if seen else ((),) * num_steps
    return {"hidden_states": hidden, "attentions": attentions}


def _attention(engine: PagedEngine) -> str:
    config: Any = engine.model.config
    return getattr(config, "_attn_implementation", None) or "eager"


def _columns(prepared: Prepared, call: Call, num_steps: int) -> Columns:
    width = prepared.prompt_width
    # Columns of a cache that was given; by now it may have been filled on.
    given = (s.num_pad + s.given_kv.num_tokens for s in call.sequences if s.given_kv is not None)
    first = max(given, default=0)
    if chunk := prepared.config.prefill_chunk_size:
        first += (width - first - 1) // chunk * chunk
    return Columns(first, width, num_steps)


def selects_layers() -> bool:
    """Whether this transformers takes numbers of layers; older ones read some of them as something else."""
    return hasattr(output_capturing, "selected_hidden_states")


def _selected(selection: Any, layers: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Newer transformers takes numbers of layers too: None stands for the others."""
    upstream: Any = output_capturing
    numbers = upstream.selected_hidden_states(selection) if selects_layers() else None
    if numbers is None:
        return layers
    resolved = upstream.resolve_hidden_states_indices(None, numbers, len(layers))
    return tuple(layer if i in resolved else None for i, layer in enumerate(layers))
