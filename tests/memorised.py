"""A model that knows four short conversations by heart, for tests of what users see.

"Who are you?"                  -> "I am a seed. 🌱"              a character whose bytes are several tokens
"你是谁？"                       -> "我是一颗种子。"
"Add 2 and 3", then "Add 1"     -> <think>2+3</think>5, then 6    reasoning, and a second turn
"Weather in Rome?"              -> Let me look. <tool_call>{"name": "weather", ...}</tool_call>
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dataset import DEFAULT_TOKENIZER, load_tokenizer, render_chat
from model import GPT, GPTConfig, save_pretrained


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CONVERSATIONS = [
    [user("Who are you?"), assistant("I am a seed. 🌱")],
    [user("你是谁？"), assistant("我是一颗种子。")],
    [user("Add 2 and 3"), assistant("5", reasoning_content="2+3"), user("Add 1"), assistant("6")],
    [user("Weather in Rome?"), assistant("Let me look. ", tool_calls=[CALL])],
]


def make_memorised(folder: Path, conversations: Any = CONVERSATIONS, **shape: Any) -> Path:
    """Train until every supervised token is certain, and save a model folder."""
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**({"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 96} | shape)))
    rendered = [render_chat(tokenizer, messages) for messages in conversations]
    width = max(len(r.ids) for r in rendered)
    ids = torch.tensor([F.pad(torch.tensor(r.ids), (0, width - len(r.ids))).tolist() for r in rendered])
    mask = torch.tensor([r.mask + [False] * (width - len(r.mask)) for r in rendered])
    labels = torch.where(mask[:, 1:], ids[:, 1:], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        losses = model(ids[:, :-1], labels=labels)
        if losses.max() < 0.02:
            break
        losses.sum().div(mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.max() < 0.02
    save_pretrained(model, folder)
    tokenizer.save(folder)
    return folder
