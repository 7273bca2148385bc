"""The arm of padded batches that grow to a token budget, as vLLM's throughput benchmark runs transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from hf_paged.comparison.arm_generate import PaddedArm
from hf_paged.comparison.arms import ArmContext, position_limit


class TokenBudgetArm(PaddedArm):
    """Batches grown as vLLM's throughput benchmark grows them for its "hf" backend.

    Requests as they come; one more joins while there are fewer than `batch_size` and the longest prompt and longest
    output stay within 2048 tokens together. That benchmark passes no mask, samples, and credits tokens that HF may not
    have made; here prompts are padded on the left with their mask, decoding is greedy, and asked-for tokens count.
    """

    name: ClassVar[str] = "padded_budget"
    title: ClassVar[str] = "HF padded, vLLM's protocol"
    budget: ClassVar[int] = 2048

    def __init__(self, context: ArmContext, *, batch_size: int, subset: int | None = None) -> None:
        super().__init__(context, batch_size=batch_size, order="dataset", subset=subset)

    def token_limit(self) -> int | None:
        return min(self.budget, position_limit(self.context.model) or self.budget)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"token_budget": self.budget, "mask": True}
