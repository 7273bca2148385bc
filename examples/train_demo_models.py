"""Train the demo models under `examples/models/`: GPT-2, GPTBigCode, LLaMA, half a million parameters each.

    OMP_NUM_THREADS=1 python examples/train_demo_models.py --family llama --output examples/models/llama

Needs `torch`, `transformers`, `tokenizers` and `tqdm`; no network. One core takes some minutes a model; the
same Python, torch, threads and seed give the same weights. The models write functions and docstrings in the
manner of the standard library: they end by themselves, hit stop strings and can be read, but know nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_corpus import ASSISTANT, USER, Document, corpus_digest, load_corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS, BOS, PAD = "<|endoftext|>", "<|begin|>", "<|pad|>"
VOCAB_SIZE = 1024
ROW_TOKENS = 256
ROWS_A_STEP = 16
POSITIONS = 512
PEAK_LEARNING_RATE = 4e-3
WARM_UP_STEPS = 60
# Rotary positions learn to look back much sooner than learned ones.
STEPS = {"gpt2": 2400, "gpt_bigcode": 1400, "llama": 400}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ('<|user|>' if message['role'] == 'user' else '<|assistant|>') + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


def train_tokenizer(texts: Sequence[str], family: str) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE that all families share.

    Args:
        texts: the training documents.
        family: "llama" puts BOS before every text, as its tokenizers do, and has a chat template; the other
            families know no BOS of their own.

    Returns:
        A tokenizer with EOS, BOS and padding tokens, padding on the left.
    """
    tokenizer = Tokenizer(models.BPE())
    # Single digits keep numbers from taking merges away from words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[EOS, BOS, PAD, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    is_llama = family == "llama"
    if is_llama:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]),
            ]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=BOS if is_llama else EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=1024 if is_llama else POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if is_llama:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make the untrained model of a family; every one fits into 2 MB of float32."""
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if family == "gpt2":
        config = GPT2Config(n_positions=POSITIONS, n_embd=96, n_layer=3, n_head=3, **no_dropout, **special)
        return GPT2LMHeadModel(config)
    if family == "gpt_bigcode":
        config = GPTBigCodeConfig(
            n_positions=POSITIONS,
            n_embd=96,
            n_layer=3,
            n_head=6,
            n_inner=448,
            multi_query=True,
            **no_dropout,
            **special,
        )
        return GPTBigCodeForCausalLM(config)
    config = LlamaConfig(
        max_position_embeddings=1024,
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **special,
    )
    return LlamaForCausalLM(config)


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Turn documents into token ids, each closed by EOS."""
    encoded = tokenizer([doc.text for doc in documents])["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def pack_rows(documents: Sequence[Sequence[int]], rng: random.Random) -> torch.Tensor:
    """Shuffle documents and fill rows with them, one pass over the corpus.

    Every row starts where a document starts, as every prompt will; the document that crosses its end is cut.

    Returns:
        int64 [rows, ROW_TOKENS].
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for index in rng.sample(range(len(documents)), len(documents)):
        row.extend(documents[index])
        if len(row) >= ROW_TOKENS:
            rows.append(row[:ROW_TOKENS])
            row = []
    return torch.tensor(rows)


def train(model: PreTrainedModel, documents: Sequence[Sequence[int]], steps: int, seed: int) -> float:
    """Train with AdamW, warm-up and a cosine to zero.

    Returns:
        Mean loss of the last twentieth of the steps, in nats a token.
    """
    rng = random.Random(seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    rows = torch.empty(0, ROW_TOKENS, dtype=torch.long)
    losses: list[float] = []
    model.train()
    for step in (bar := tqdm(range(steps), desc=model.config.model_type)):
        if len(rows) < ROWS_A_STEP:
            rows = pack_rows(documents, rng)
        batch, rows = rows[:ROWS_A_STEP], rows[ROWS_A_STEP:]
        progress = max(0, step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
        scale = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * scale
        # Half of the steps start later, or learned positions beyond a row would stay at their random start.
        offset = rng.choice([0, rng.randrange(POSITIONS - ROW_TOKENS + 1)])
        positions = torch.arange(offset, offset + ROW_TOKENS).expand(len(batch), -1)
        loss = model(batch, labels=batch, position_ids=positions, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{statistics.fmean(losses[-50:]):.3f}")
    model.eval()
    return statistics.fmean(losses[-max(1, steps // 20) :])


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, documents: Sequence[Sequence[int]]) -> float:
    """Return the mean loss over the documents, one at a time, in nats a token."""
    total = count = 0
    for ids in documents:
        row = torch.tensor([ids])
        total += model(row, labels=row, use_cache=False).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


def unigram_entropy(documents: Sequence[Sequence[int]]) -> float:
    """Return the loss, in nats a token, of guessing every token by its frequency alone."""
    counts = Counter(token for ids in documents for token in ids)
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


@torch.no_grad()
def greedy_report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> dict[str, float]:
    """Continue the prompts greedily, up to 200 tokens each, and measure how the continuations end.

    Returns:
        Shares of prompts that end by EOS and that write a blank line or a function, and the top-2 logit gap
        over all tokens: minimum, percentiles, and the count below 1e-4, where float32 kernels may differ.
    """
    gaps: list[float] = []
    ended = blank = defined = 0
    for prompt in tqdm(prompts, desc="greedy"):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=200, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        top = torch.cat(out.logits).float().topk(2).values
        gaps.extend((top[:, 0] - top[:, 1]).tolist())
        new = out.sequences[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(new)
        ended += int(new[-1] == tokenizer.eos_token_id)
        blank += "\n\n" in text
        defined += "def " in text
    gaps.sort()
    return {
        "tokens": len(gaps),
        "end_by_eos": ended / len(prompts),
        "blank_line": blank / len(prompts),
        "def": defined / len(prompts),
        "gap_min": gaps[0],
        "gap_0.1%": gaps[len(gaps) // 1000],
        "gap_1%": gaps[len(gaps) // 100],
        "gaps_below_1e-4": sum(gap < 1e-4 for gap in gaps),
    }


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model and its tokenizer so that the Auto classes load them offline."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its internal class name; other versions and libraries read this public one too.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one demo model and report how it writes.")
    parser.add_argument("--family", choices=list(STEPS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, help=f"of {ROWS_A_STEP} x {ROW_TOKENS} tokens; default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts" / "mixed.jsonl")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    documents, unseen = load_corpus()
    print(f"{len(documents)} documents, corpus {corpus_digest(documents)}")
    tokenizer = train_tokenizer([doc.text for doc in documents], args.family)
    encoded, held_out = encode(documents, tokenizer), encode(unseen, tokenizer)
    model = build_model(args.family, tokenizer)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, encoded)):,} tokens")

    report: dict[str, float | str] = {"family": args.family}
    report["train_loss"] = train(model, encoded, args.steps or STEPS[args.family], args.seed)
    save(model, tokenizer, args.output)
    report["held_out_loss"] = held_out_loss(model, held_out)
    report["unigram_entropy"] = unigram_entropy(held_out)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    report.update(greedy_report(model, tokenizer, [json.loads(line)["prompt"] for line in lines]))
    print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in report.items()}))


if __name__ == "__main__":
    main()
