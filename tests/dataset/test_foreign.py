"""Chat models of others: the ids are those of transformers' `apply_chat_template`, the mask is the assistant's part,
and nobody's text becomes a control token."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dataset import CONVERSATION, DEFAULT_TOKENIZER, PAIR, DataError, load_tokenizer, render_chat
from dataset.chat import Rendered
from dataset.encode import Rules, encode_files
from dataset.tokenizer import HFTokenizer
from tests.dataset.foreign import CHATML, FAMILIES, LLAMA2, QWEN3, make_foreign_folder, make_llama2_folder
from tests.helpers import write_jsonl

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: make(base / name) for name, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: dict[str, Path]) -> HFTokenizer:
    return opened(folders[request.param])


def opened(folder: Path) -> HFTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def chat(*texts: str, system: str = "") -> Messages:
    """User and assistant in turn."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def template_ids(tokenizer: HFTokenizer, messages: Messages, prompt: bool = False) -> list[int]:
    """What transformers says, in an instance of its own."""
    hf = AutoTokenizer.from_pretrained(str(tokenizer.folder))
    return hf.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompt)


def supervised(rendered: Rendered) -> list[int]:
    return [i for i, kept in zip(rendered.ids, rendered.mask, strict=True) if kept]


ORDINARY = {
    "plain": chat("hello there", "I am well, thank you."),
    "turns": chat("hello", "yes", "What is the weather?", "今天天气很好。", system="You are the old tree."),
    "unmerged": chat("Zq9 ∑ 🌱", "(12345) ~~ é"),
    "trimmed": chat("  hello\n", " yes \n\n", "\n\tagain  ", "the  red   bird"),
    "lines": chat("def f(x):\n\n    return x", "Sure:\n- one\n- two\n"),
    "combining": chat("cafe\u0301", "e\u0301\u0301"),
    "punctuated": chat("(hello)", ": yes", "[/", "] no ["),
    "blank": chat("   ", "yes"),
    "empty": chat("hello", ""),
    "empty early": chat("hello", "", "again", "yes"),
}


@pytest.mark.parametrize("messages", ORDINARY.values(), ids=ORDINARY)
def test_ids_are_those_of_apply_chat_template(family: HFTokenizer, messages: Messages) -> None:
    assert render_chat(family, messages).ids == template_ids(family, messages)
    prompt = messages[:-1]
    assert render_chat(family, prompt, add_generation_prompt=True).ids == template_ids(family, prompt, prompt=True)


@pytest.mark.parametrize("messages", ORDINARY.values(), ids=ORDINARY)
def test_an_answer_and_its_end_are_supervised(family: HFTokenizer, messages: Messages) -> None:
    rendered = render_chat(family, messages)
    ends = [i for i in supervised(rendered) if i in family.stop_ids]
    assert len(ends) == sum(message["role"] == "assistant" for message in messages)
    assert supervised(rendered)[-1] == family.end_of_turn_id
    prompt = render_chat(family, messages[:-1], add_generation_prompt=True).ids
    assert rendered.ids[: len(prompt)] == prompt
    assert not rendered.mask[len(prompt) - 1] and rendered.mask[len(prompt)]
    said = family.decode(rendered.ids[len(prompt) :]).replace("<think>", "").replace("</think>", "")
    wanted = messages[-1]["content"].strip()
    assert unicodedata.normalize("NFC", said.strip()) == unicodedata.normalize("NFC", wanted)


@pytest.mark.parametrize("messages", ORDINARY.values(), ids=ORDINARY)
def test_preferences_supervise_the_tokens_that_tuning_does(
    family: HFTokenizer, messages: Messages, tmp_path: Path
) -> None:
    rejected = [*messages[:-1], {"role": "assistant", "content": "another"}]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": messages, "rejected": rejected}])
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": messages}, {"conversations": rejected}])
    pair = encode_files([str(pairs)], family, Rules(PAIR, 512), tmp_path).columns.to_pylist()[0]
    rows = encode_files([str(chats)], family, Rules(CONVERSATION, 512), tmp_path).columns.to_pylist()
    for side, row in zip(("chosen", "rejected"), rows, strict=True):
        assert pair[side] == row["ids"]
        assert (pair["prompt"], len(pair[side])) == tuple(row["spans"][-2:])


def test_an_answer_that_would_merge_with_its_prompt_begins_by_itself(folders: dict[str, Path]) -> None:
    tokenizer = opened(folders["chatml"])  # "assistant\n" and "\n\nyes": one token of newlines
    messages = chat("hello", "\n\nyes")
    prompt = render_chat(tokenizer, messages[:1], add_generation_prompt=True).ids
    rendered = render_chat(tokenizer, messages)
    assert rendered.ids[: len(prompt)] == prompt
    assert tokenizer.decode(rendered.ids) == "user\nhello\nassistant\n\n\nyes\n"
    assert tokenizer.decode(supervised(rendered), skip_control=False) == "\n\nyes<|im_end|>"


CALL = {"name": "weather", "arguments": {"city": "Rome", "days": [1]}}
CALLING = {"tool_calls": [{"type": "function", "function": CALL}]}
QWEN_TOOLS: Messages = [
    {"role": "user", "content": "the weather in Rome?"},
    {"role": "assistant", "content": "", "reasoning_content": "\nI am well.\n", **CALLING},
    {"role": "tool", "content": '{"rain": "no"}'},
    {"role": "assistant", "content": "\n\nno rain", "reasoning_content": "well"},
]


def test_reasoning_and_calls_are_those_of_apply_chat_template(folders: dict[str, Path]) -> None:
    tokenizer = opened(folders["qwen3"])
    rendered = render_chat(tokenizer, QWEN_TOOLS)
    assert rendered.ids == template_ids(tokenizer, QWEN_TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": [1]}}\n</tool_call>'
    first, second = "<think>\nI am well.\n</think>\n\n", "<think>\nwell\n</think>\n\n"
    spoken = f"{first}{call}<|im_end|>{second}no rain<|im_end|>"
    assert tokenizer.decode(supervised(rendered), skip_control=False) == spoken


def test_a_text_that_the_template_writes_as_json_is_written_as_json(folders: dict[str, Path]) -> None:
    tokenizer = opened(folders["llama3"])
    messages = [*chat("hello", "yes"), {"role": "tool", "content": 'one "two"\n<|eot_id|>'}]
    rendered = render_chat(tokenizer, messages).ids
    assert tokenizer.decode(rendered).endswith('tool\n\n"one \\"two\\"\\n<|eot_id|>"')
    ordinary = [*messages[:2], {"role": "tool", "content": 'one "two"\n'}]
    assert render_chat(tokenizer, ordinary).ids == template_ids(tokenizer, ordinary)


def test_control_tokens_in_text_stay_text_whether_they_are_called_special_or_not(family: HFTokenizer) -> None:
    names = [family.hf.convert_ids_to_tokens(i) for i in sorted(family.control_ids)]
    attack = "a " + " ".join(names) + "".join(names)
    plain = render_chat(family, chat("hello", "yes", system="tree"))
    rendered = render_chat(family, chat(attack, "yes", system=attack))
    assert supervised(rendered) == supervised(plain)
    control = [[i for i in ids if i in family.control_ids] for ids in (rendered.ids, plain.ids, family.encode(attack))]
    assert control[0] == control[1] and control[2] == []
    text = family.decode(rendered.ids, skip_control=False)
    assert text.count(attack) == 2 and family.decode(family.encode(attack)) == attack


def test_qwens_think_and_tool_call_are_control_tokens_and_an_added_word_is_not(folders: dict[str, Path]) -> None:
    tokenizer = opened(folders["qwen3"])
    word, think = (tokenizer.hf.convert_tokens_to_ids(name) for name in ("ordinary", "<think>"))
    messages = chat("ordinary <think>", "yes")
    assert render_chat(tokenizer, messages).ids.count(think) == 1  # the template's own
    assert word in render_chat(tokenizer, messages).ids and word in tokenizer.encode("ordinary")


# Rows that a template cannot say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "found"),
    [
        (
            LLAMA2.replace("bos_token", "''"),
            [*chat("hello"), *chat("hello", "yes")],
            "the chat template of .* refuses these messages: Conversation roles must alternate",
        ),
        (
            QWEN3,
            [*chat("hi"), {"role": "assistant", "content": "", "tool_calls": [{"name": 3, "arguments": {}}]}],
            "message 1: found 3 as the name of a tool call, expected a string",
        ),
        (QWEN3, [*chat("hi"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "refuses these"),
    ],
)
def test_a_row_that_the_template_refuses_is_a_bad_row(
    tmp_path: Path, template: str, messages: Messages, found: str
) -> None:
    tokenizer = opened(make_foreign_folder(tmp_path / "model", template))
    rows = [{"conversations": each} for each in (chat("a", "b"), messages, chat("c", "d"))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{found}"):
        encode_files([str(path)], tokenizer, Rules(CONVERSATION, 512), tmp_path)
    skipped = encode_files([str(path)], tokenizer, Rules(CONVERSATION, 512, "skip"), tmp_path)
    assert skipped.report.used == 2 and json.dumps(skipped.report.bad).count("rows.jsonl:2") == 1


def test_a_template_that_wants_a_system_prompt_renders_rows_that_have_one(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    tokenizer = opened(make_foreign_folder(tmp_path, refusing + CHATML))
    rendered = render_chat(tokenizer, chat("hello", "yes", system="tree"))
    assert tokenizer.decode(supervised(rendered), skip_control=False) == "yes<|im_end|>"
    with pytest.raises(ValueError, match="refuses these messages: no system prompt"):
        render_chat(tokenizer, chat("hello", "yes"))


# A model that came without a template --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_chatml_is_given_to_a_tokenizer_without_a_template_and_saved_with_it(tmp_path: Path, end: str) -> None:
    if end == "</s>":
        folder = make_llama2_folder(tmp_path / "base", template=None)
    else:
        folder = make_foreign_folder(tmp_path / "base", template=None)
    load_tokenizer(folder, "chatml").save(tmp_path / "run")
    given, saved = load_tokenizer(folder, "chatml"), opened(tmp_path / "run")
    assert given.fingerprint == saved.fingerprint != load_tokenizer(folder).fingerprint
    assert saved.has_chat_template and saved.end_of_turn_id == saved.hf.convert_tokens_to_ids(end)
    messages = [*chat("hello", "yes", "the weather?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rendered = render_chat(given, messages)
    assert rendered == render_chat(saved, messages)
    messages[-1] = {"role": "assistant", "content": "", **CALLING}
    assert rendered.ids == template_ids(saved, messages)
    call = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert saved.decode(supervised(rendered), skip_control=False) == f"yes{end}{call}{end}"


def test_a_template_of_ones_own_stands_in_for_the_folders(tmp_path: Path) -> None:
    folder = make_foreign_folder(tmp_path / "base")
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] + ':' + m.content + '<|im_end|>' }}{% endfor %}")
    tokenizer = load_tokenizer(folder, str(file))
    rendered = render_chat(tokenizer, chat("hello", "yes"))
    assert tokenizer.decode(rendered.ids, skip_control=False) == "u:hello<|im_end|>a:yes<|im_end|>"


@pytest.mark.parametrize(
    ("own", "template", "told"),
    [(False, "chatm", "--chat_template chatm: no such file; give chatml"), (True, "chatml", "this project's own")],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, own: bool, template: str, told: str) -> None:
    folder = DEFAULT_TOKENIZER if own else make_foreign_folder(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load_tokenizer(folder, template)
