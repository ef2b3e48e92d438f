"""A chat form for Ollama: a Modelfile beside a GGUF file, its Go template read off what our renderer writes.

    <s><|user|>Hi<|end|><|assistant|>     {{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}
                                          <|user|>{{ .Prompt }}<|end|><|assistant|>{{ .Response }}<|end|>

Ollama repeats such a template for every round and leaves off behind the last .Response. Reasoning and tools have no
place in it.
"""

from pathlib import Path

from dataset import Message, TextTokenizer, render_chat
from export.gguf_file import begins_with_bos

SYSTEM, FIRST, ANSWER, SECOND = MARKS = ("\u0416S\u0416", "\u0416F\u0416", "\u0416A\u0416", "\u0416N\u0416")


def modelfile(tokenizer: TextTokenizer, gguf: str, context: int) -> str | None:
    """The text of a Modelfile for the GGUF file of this name; None where rounds of the chat form are not all alike."""
    template = go_template(tokenizer)
    if template is None:
        return None
    stops = [tokenizer.token_text(i) for i in tokenizer.stop_ids]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n"


def go_template(tokenizer: TextTokenizer) -> str | None:
    """What stands around a system prompt, a question and an answer, where that is the same in every round."""
    if not tokenizer.has_chat_template:
        return None
    rounds: list[Message] = [
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": SECOND},
    ]
    try:
        before, between, after, asked = (
            rendered(tokenizer, rounds).replace(SECOND, FIRST).replace(ANSWER, FIRST).split(FIRST)
        )
        begin, rest = rendered(tokenizer, [{"role": "system", "content": SYSTEM}, *rounds[:1]]).split(SYSTEM)
    except ValueError:  # a text is there twice or not at all, or the template refuses a system prompt
        return None
    end, question = after.removesuffix(before), f"{before}{{{{ .Prompt }}}}{between}"
    if not after.endswith(before) or between != asked or not rest.endswith(before + FIRST + asked):
        return None
    system = begin + "{{ .System }}" + rest.removesuffix(before + FIRST + asked)
    return f"{{{{ if .System }}}}{system}{{{{ end }}}}{question}{{{{ .Response }}}}{end}"


def rendered(tokenizer: TextTokenizer, messages: list[Message]) -> str:
    """The text of a prompt, without the <s> that Ollama adds by itself."""
    ids = render_chat(tokenizer, messages, add_generation_prompt=True).ids
    return tokenizer.decode(ids[begins_with_bos(tokenizer) :], skip_control=False)


def write_modelfile(tokenizer: TextTokenizer, gguf: Path, context: int) -> Path | None:
    """Beside the GGUF file, under a name of its own where there is one already; None where there is none to write."""
    text = modelfile(tokenizer, gguf.name, context)
    if text is None:
        return None
    path = gguf.with_name("Modelfile")
    path = gguf.with_suffix(".Modelfile") if path.exists() else path
    path.write_text(text, encoding="utf-8")
    return path
