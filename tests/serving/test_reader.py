"""What a client is told as tokens come, put together, is what the whole answer says; and nothing is told too early."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import DEFAULT_TOKENIZER, load_tokenizer, parse_answer
from evaluation.tools.calls import Call
from serving.reader import ChatReader, Delta, StopStrings, TextReader

TOKENIZER = load_tokenizer(DEFAULT_TOKENIZER)
CONTROLS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALLS = ('{"name": "f", "arguments": {"x": [1, "世"]}}', '{"name": "g"}', "no call", '[{"name": "f"}, {"name": "g"}]')
PARTS = st.lists(
    st.sampled_from(CONTROLS) | st.sampled_from(CALLS) | st.text("<think/ 世🌱\n", max_size=6), max_size=12
)


def encode(parts: list[str]) -> list[int]:
    """A control token's name is that token where it is a part of its own, and text elsewhere."""
    ids: list[int] = []
    for part in parts:
        ids += [TOKENIZER.token_id(part)] if part in CONTROLS else TOKENIZER.encode(part)  # type: ignore[attr-defined]
    return ids


def told(reader: TextReader, ids: list[int]) -> list[Delta]:
    found = [delta for token in ids for delta in reader.push(token)]
    return found + reader.finish()


def together(deltas: list[Delta]) -> tuple[str, str, list[Call]]:
    """Thought, text and calls."""
    texts = {"reasoning_content": "", "content": ""}
    for delta in deltas:
        if not isinstance(delta, Call):
            assert delta.text
            texts[delta.kind] += delta.text
    return texts["reasoning_content"], texts["content"], [delta for delta in deltas if isinstance(delta, Call)]


def whole(text: str) -> tuple[str, str, list[Call]]:
    """Thought, text and calls of a whole answer."""
    thought = re.match(r"\s*<think>(.*?)(</think>|\Z)", text, re.DOTALL)
    rest, calls = text[thought.end() :] if thought else text, list[Call]()

    def take(found: re.Match[str]) -> str:
        try:
            value = json.loads(found[1])
        except ValueError:
            return found[0]
        each = value if isinstance(value, list) else [value]
        calls.extend(Call(call["name"], call.get("arguments", {})) for call in each)
        return ""

    return thought[1] if thought else "", re.sub(r"<tool_call>(.*?)</tool_call>", take, rest, flags=re.DOTALL), calls


@settings(max_examples=100, deadline=None)
@given(PARTS)
def test_a_stream_says_what_the_whole_answer_says(parts):
    ids = encode(parts)
    assert together(told(ChatReader(TOKENIZER), ids)) == whole(TOKENIZER.decode(ids, skip_control=False))


def test_an_answer_is_read_as_parse_answer_reads_it():
    ids = encode(["\n", "<think>", "2+3", "</think>", "5 ", "<tool_call>", CALLS[0], "</tool_call>", "!"])
    message = parse_answer(TOKENIZER.decode(ids, skip_control=False))
    thought, text, calls = together(told(ChatReader(TOKENIZER), ids))
    assert (thought, text) == (message["reasoning_content"], message["content"])
    assert [call._asdict() for call in calls] == message["tool_calls"]


def test_text_and_thoughts_are_told_at_once_and_a_call_when_it_is_whole():
    reader = ChatReader(TOKENIZER)
    for part, kind in (("<think>", None), ("so", "reasoning_content"), ("</think>", None), ("Hi", "content")):
        for token in encode([part]):
            assert [delta.kind for delta in reader.push(token)] == ([kind] if kind else [])
    for token in encode(["<tool_call>", CALLS[0]]):
        assert reader.push(token) == []
    assert reader.push(*encode(["</tool_call>"])) == [Call("f", {"x": [1, "世"]})]


def test_what_never_ends_is_told_in_the_end():
    assert together(told(ChatReader(TOKENIZER), encode(["<think>", "so </thin"]))) == ("so </thin", "", [])
    assert together(told(ChatReader(TOKENIZER), encode(["a", "<tool_call>", '{"na']))) == ("", 'a<tool_call>{"na', [])
    assert together(told(ChatReader(TOKENIZER), encode([" <thi"]))) == ("", " <thi", [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_wherever_it_is_cut(pieces, stop):
    reader, text = StopStrings(stop), "".join(pieces)
    found = "".join([reader.push(piece) for piece in pieces] + [reader.push("", end=True)])
    ends = [text.find(each) for each in stop if each in text]
    # where one stop string ends before another that begins earlier does, the text is cut when the first is whole
    assert reader.found == bool(ends)
    assert found == text if not ends else text.startswith(found) and len(found) >= min(ends)
    if len(stop) == 1 and ends:
        assert found == text[: ends[0]]


def test_nothing_of_a_stop_string_is_told_and_the_rest_at_once():
    reader = StopStrings(["END"])
    assert [reader.push(piece) for piece in ("a", "bE", "N", "x", "EN", "D", "more")] == [
        "a",
        "b",
        "",
        "ENx",
        "",
        "",
        "",
    ]


def test_stop_strings_end_an_answer_and_not_a_thought():
    reader = ChatReader(TOKENIZER, ["wo"])
    assert together(told(reader, encode(["<think>", "two", "</think>", "one two"]))) == ("two", "one t", [])
    assert reader.stopped


def test_a_character_is_told_as_a_whole():
    ids = TOKENIZER.encode("🌱")
    assert len(ids) > 1
    reader = TextReader(TOKENIZER)
    assert [[delta[1] for delta in reader.push(token)] for token in ids] == [[]] * (len(ids) - 1) + [["🌱"]]
    cut = TextReader(TOKENIZER)
    assert [delta[1] for delta in told(cut, ids[:-1])] == ["\ufffd"]
