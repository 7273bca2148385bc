"""A chat whose every turn finds the turns before it in the cache. Run: python examples/chat_prefix_reuse.py [MODEL]"""

import sys
from pathlib import Path

from transformers import pipeline

import hf_paged

name = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "llama")
pipe = pipeline("text-generation", model=name)
model = hf_paged.enable(pipe).model

chat: list[dict[str, str]] = []
for question in ("What does os.path.join do?", "And if a part is absolute?", "How do I split a path again?"):
    before = hf_paged.stats(model)
    chat.append({"role": "user", "content": question})
    chat = pipe(chat, max_new_tokens=24, do_sample=False)[0]["generated_text"]
    after = hf_paged.stats(model)
    print(f"> {question}\n{chat[-1]['content']}")
    reused = after.prefix_hit_tokens - before.prefix_hit_tokens
    print(f"  ({reused} of {after.prompt_tokens - before.prompt_tokens} prompt tokens were in the cache)")
