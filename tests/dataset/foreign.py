"""A small tokenizer folder as others publish them: tokenizer.json, special tokens, a ChatML template."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}\
{% for c in m.tool_calls or [] %}\
{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}\
{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_foreign_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer as Llama 3 and Qwen3 have it, without merges: 256 bytes, 3 special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 256, 257, 258
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
