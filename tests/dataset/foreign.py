"""Small tokenizer folders as others publish them: tokenizer.json, special tokens, a chat template.

`make_foreign_folder` is the least there can be, bytes and ChatML; `FAMILIES` are made as the folders of Llama 2,
Llama 3, Qwen3 and a ChatML model are, with merges learnt from a few words.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}\
{% for c in m.tool_calls or [] %}\
{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}\
{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}\
{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}\
{{ '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}
        {{- '<think>\n' + (m.reasoning_content or '').strip('\n') + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- m.content.lstrip('\n') if loop.index0 > ns.last else m.content -}}
    {%- for c in m.tool_calls or [] -%}
        {%- if not loop.first or m.content -%}{{- '\n' -}}{%- endif -%}
        {{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' -}}
        {{- c.function.arguments | tojson -}}{{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
{%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

CORPUS = [
    "hello there, how are you today? I am well, thank you. What is the weather like in Rome?",
    "The cat sees the dog near the old house and then the dog finds the red bird under the tree.",
    "[INST] hello [/INST] yes </s> system user assistant",
    "你好，世界。今天天气怎么样？今天天气很好。",
    "def f(x):\n\n    return x  # one\n\n\nSure:\n- one\n- two\n",
] * 4
WORDS_OF_LLAMA3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_foreign_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer as Llama 3 and Qwen3 have it, without merges: 256 bytes, 3 special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 256, 257, 258
    return write_folder(folder, tokenizer, template, eos_token="<|endoftext|>")


def make_llama2_folder(folder: Path, template: str | None = LLAMA2, metaspace: bool = False) -> Path:
    """SentencePiece's kind: no words, spaces are U+2581, one stands before every text (or, with `metaspace`, the newer
    form of the same, before the first alone); what has no piece is spelt in bytes."""
    space = "\u2581"
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for line in CORPUS for word in line.split(" ")]  # no merges over spaces
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    trained.train_from_iterator(words, trainer)
    learnt = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(names[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return write_folder(folder, tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_byte_level_folder(folder: Path, template: str, special: list[str], added: list[str], **tokens: str) -> Path:
    """Bytes with merges inside words, as Llama 3 and Qwen3 have it; `added` tokens are not called special."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(WORDS_OF_LLAMA3, behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return write_folder(folder, tokenizer, template, **tokens)


def write_folder(folder: Path, tokenizer: tokenizers.Tokenizer, template: str | None, **tokens: str) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama2": make_llama2_folder,
    "llama2-metaspace": partial(make_llama2_folder, metaspace=True),
    "llama3": partial(
        make_byte_level_folder,
        template=LLAMA3,
        special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        added=[],
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    ),
    "qwen3": partial(
        make_byte_level_folder,
        template=QWEN3,
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        added=["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "ordinary"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ),
    "chatml": partial(
        make_byte_level_folder,
        template=CHATML,
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        added=[],
        eos_token="<|endoftext|>",
    ),
}
