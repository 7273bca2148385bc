"""bf16 and fp16: the engine's logits are as near to float32 as upstream's own; the demo models write the same text."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from hf_paged.engine.request import Call, FinishReason
from tests.helpers import FAMILIES, demo_model, demo_tokenizer, make_model, native_calls, random_prompts
from tests.parity.grid import VARIANTS


class TeacherForcing:
    """In place of the engine's sampler: records logits and continues with given tokens, whatever the logits say."""

    def __init__(self, texts: list[list[int]], prompt_len: int) -> None:
        self.texts, self.prompt_len = texts, prompt_len
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def sample(self, logits, sequences):
        for row, seq in zip(logits, sequences, strict=True):
            self.logits[seq.row, seq.num_tokens - 1] = row.float().clone()
        return [self.texts[s.row][s.num_tokens] for s in sequences]

    def stops(self, sequences):
        return [FinishReason.LENGTH if s.num_generated >= s.max_new_tokens else None for s in sequences]


def engine_logits(model, texts, prompt_len, **options):
    """Logits [rows, positions, V] after prompt_len..n-1 tokens: the first from a prompt, the others from
    decode steps."""
    with hf_paged.enabled(model, block_size=4, max_num_batched_tokens=24, max_num_seqs=16, **options):
        engine = registry.get(model)
        teacher = engine._loop.ready().sampler = TeacherForcing(texts, prompt_len)
        call = Call(sampling=None, ambient=engine.ambient())
        for text in texts:
            call.add_row(text[:prompt_len], len(text) - prompt_len)
        engine.run(call)
    positions = range(prompt_len - 1, len(texts[0]) - 1)
    return torch.stack(
        [torch.stack([teacher.logits[row, p] for p in positions]) for row in range(len(texts))]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "variant"), [(f, v) for f, variants in VARIANTS.items() for v in list(variants)[:5]], ids=str
)
def test_teacher_forced_logits_are_as_exact_as_upstreams(family, variant, dtype):
    low = make_model(family, dtype=dtype, **VARIANTS[family][variant])
    exact = copy.deepcopy(low).float()
    texts = random_prompts([40] * 6, seed=3)
    ids = torch.tensor(texts)
    with torch.no_grad():
        truth = exact(input_ids=ids).logits[:, 8:39]
        upstream = low(input_ids=ids).logits[:, 8:39].float()
    ours = engine_logits(low, texts, prompt_len=9)
    error, allowed = (ours - truth).pow(2).mean().sqrt(), (upstream - truth).pow(2).mean().sqrt()
    assert allowed > 0
    assert error <= 2 * allowed, f"root mean square error {error:.2e}, upstream's {allowed:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_demo_models_write_the_same_text_in_bf16(family):
    """Up to a near-tie of the 16-bit logits themselves: their spacing there is the size of the gap."""
    model, tokenizer = demo_model(family, dtype=torch.bfloat16), demo_tokenizer(family)
    prompts = ["def read(self, size=-1):\n", "Return the", "class Error(Exception):", "import os\n"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    kwargs = dict(inputs) | {"max_new_tokens": 24, "do_sample": False}
    kwargs.pop("token_type_ids", None)
    expected = model.generate(**kwargs, return_dict_in_generate=True, output_logits=True)
    with hf_paged.enabled(model), native_calls(model):
        actual = model.generate(**kwargs)
    width = kwargs["input_ids"].shape[1]
    for row in range(len(prompts)):
        for step in range(min(actual.shape[1], expected.sequences.shape[1]) - width):
            if actual[row, width + step] == expected.sequences[row, width + step]:
                continue
            best = expected.logits[step][row].float().topk(2).values
            assert best[0] - best[1] <= 4 * torch.finfo(torch.bfloat16).eps * best[0].abs(), (
                f"row {row}, step {step}"
            )
            break
