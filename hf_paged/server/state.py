"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from transformers import GenerationConfig

from hf_paged.engine.stats import EngineStats
from hf_paged.server.admission import Admission
from hf_paged.server.config import ServerConfig
from hf_paged.server.grammar_request import grammar_request
from hf_paged.server.grammars import Grammars
from hf_paged.server.logits import Grammar
from hf_paged.server.metrics import Metrics
from hf_paged.server.pace import Pace
from hf_paged.server.protocol import Sampling
from hf_paged.server.runs import Runs
from hf_paged.server.served_model import ServedModel
from hf_paged.server.vocabulary import Vocabulary

#: Seconds a trial request may take before the engine counts as not working.
_TRIAL_TIMEOUT = 10.0


class ServerState:
    """The served model and everything around it.

    Args:
        model: enabled.
        tokenizer: a fast one.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ServerConfig) -> None:
        self.config = config
        self.served = ServedModel(model, tokenizer, config)
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(config.model_names[0], self._stats, vllm_names=config.vllm_metric_names)
        self.runs = Runs(self.served, Admission(config), self.metrics)
        self.pace = Pace(config.max_events_per_second)
        self.grammars = Grammars(self.served, config)
        self._trial = asyncio.Lock()

    def _stats(self) -> EngineStats | None:
        engine = self.served.engine
        return None if engine is None else engine.stats()

    async def grammar_of(self, body: Sampling) -> Grammar | None:
        """The grammar that `body` wants its text to follow.

        Raises:
            APIError: 400.
        """
        request = grammar_request(body, self.config.max_grammar_bytes)
        if request is None:
            return None
        # Not in the threads that submit: compiling may take its whole time limit.
        return self.grammars.get(request) or await asyncio.to_thread(self.grammars.compile, request)

    async def trouble(self) -> str | None:
        """Why requests fail now; None if they do not. After a failed step a trial request finds out."""
        known = self.served.client.trouble(self.config.stalled_after)
        if known is None or self.served.engine is None or "step failed" not in known:
            return known
        async with self._trial:
            known = self.served.client.trouble(self.config.stalled_after)
            if known is None:
                return None
            try:
                async with asyncio.timeout(_TRIAL_TIMEOUT):
                    handle = await self.runs.in_thread(self._try_one)
                    try:
                        await handle
                    finally:
                        handle.cancel()
            except Exception as error:
                return f"{known}, and so did a trial request ({type(error).__name__})"
            return None

    def _try_one(self) -> Any:
        served = self.served
        token = next(iter(served.eos_token_ids), 0)
        config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0)
        return served.client.submit([token], config, cache_salt=secrets.token_hex(8))

    def close(self) -> None:
        """Ends what still runs; no thread is left."""
        self.grammars.close()
        self.runs.close()
