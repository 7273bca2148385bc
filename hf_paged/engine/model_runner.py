"""One forward of the user's own model over packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.engine.ambient import Ambient
from hf_paged.step import StepInputs, active_step


class ModelRunner:
    """Calls the model so that its patched attention layers read and write KV blocks.

    The dummy 4-D mask is passed through by upstream as it is. Without one, restarting positions would make it build a
    T x T mask for the packed row, which the paged layers do not read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self._mask = torch.ones(1, 1, 1, 1, device=device)

    def forward(self, model: nn.Module, inputs: StepInputs, ambient: Ambient) -> Tensor:
        """Logits [R, V] of the rows in `inputs.logits_indices`, less padding, in the model's dtype."""
        if inputs.around is None:
            return self._call(model, inputs, ambient)
        return inputs.around(lambda: self._call(model, inputs, ambient))

    def _call(self, model: nn.Module, inputs: StepInputs, ambient: Ambient) -> Tensor:
        recording = inputs.recording
        wanted = (
            {} if recording is None or not recording.wants_hidden_states else {"output_hidden_states": True}
        )
        with ambient.enter(), active_step(inputs):
            prompt = (
                {"inputs_embeds": _embedded(model, inputs)}
                if inputs.embeds
                else {"input_ids": inputs.input_ids}
            )
            output = model(
                **prompt,
                position_ids=inputs.position_ids,
                attention_mask=self._mask,
                use_cache=False,
                logits_to_keep=inputs.logits_indices,
                return_dict=True,
                **wanted,
            )
        if recording is not None and wanted:
            recording.hidden_states = output.hidden_states
        return output.logits[0]


def _embedded(model: Any, inputs: StepInputs) -> Tensor:
    """What the model would make of the ids, [1, T, E], but for the places that come embedded."""
    embedded: Tensor = model.get_input_embeddings()(inputs.input_ids)
    for place, rows in inputs.embeds:
        embedded[0, place : place + len(rows)] = rows
    return embedded
