"""The shipped tokenizer: exact round trips, control tokens out of reach, ids equal to Hugging Face's."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dataset.tokenizer import (
    CONTROL_TOKENS,
    DEFAULT_TOKENIZER,
    SPACE_MARK,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
)
from tests.dataset.foreign import make_foreign_folder

DATA = Path(os.environ.get("SEEDLING_DATA", Path(__file__).parents[3] / "shared" / "data"))
TOKENIZER = Tokenizer(DEFAULT_TOKENIZER)
HF = AutoTokenizer.from_pretrained(str(DEFAULT_TOKENIZER))

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = st.sampled_from(
    [
        SPACE_MARK,
        "\0",
        "\ufffd",
        "e\u0301",
        "👩‍👩‍👧",
        "<|end|>",
        "<s>",
        "<0x41>",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "世",
        "the",
        "--",
        "===",
    ]
)
TEXT = st.one_of(ANY_TEXT, st.lists(st.one_of(AWKWARD, ANY_TEXT), max_size=12).map("".join))


def hf_ids(text: str) -> list[int]:
    return HF.encode(text, add_special_tokens=False)


@settings(max_examples=500, deadline=None)
@given(TEXT)
@example("".join(map(chr, range(32))))
@example(f" {SPACE_MARK} {SPACE_MARK}{SPACE_MARK} ")
@example("  leading\r\n\r\n\ttab and trailing   ")
@example("".join(CONTROL_TOKENS))
def test_text_comes_back_exactly_and_without_control_tokens(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not TOKENIZER.control_ids.intersection(ids)
    assert sum(TOKENIZER.token_bytes[ids]) == len(text.encode())


@settings(max_examples=500, deadline=None)
@given(TEXT.filter(lambda text: not any(name in text for name in CONTROL_TOKENS)))
@example(f"a {SPACE_MARK}b")
@example("\0\x01")
def test_hugging_face_gives_the_same_ids(text: str) -> None:
    assert hf_ids(text) == TOKENIZER.encode(text)
    assert HF.decode(TOKENIZER.encode(text)) == text


def test_hugging_face_gives_the_same_ids_for_runs_of_one_character() -> None:
    """Where a piece can be put together in several ways, ties must fall alike."""
    for character in [chr(i) for i in range(32, 127)] + list("\n\t—…。·━█～"):
        for length in range(1, 70):
            assert hf_ids(character * length) == TOKENIZER.encode(character * length), (character, length)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["ab", " -", "\n ", "  =", "aab", "0", "的", ". "]), st.integers(1, 9)),
        max_size=8,
    )
)
def test_hugging_face_gives_the_same_ids_for_periodic_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(unit * count for unit, count in runs)
    assert hf_ids(text) == TOKENIZER.encode(text)


@pytest.mark.skipif(not DATA.exists(), reason="no test data; set SEEDLING_DATA")
def test_hugging_face_gives_the_same_ids_on_real_data() -> None:
    for path in sorted(DATA.glob("*/*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in random.Random(0).sample(lines, min(25, len(lines))):
            text = json.loads(line).get("text", line)
            if not any(name in text for name in CONTROL_TOKENS):
                assert hf_ids(text) == TOKENIZER.encode(text), path.name
                assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_one_very_long_string() -> None:
    text = "In the beginning 天地玄黄，宇宙洪荒。\n" * 80_000  # 3.8 MB
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert hf_ids(text) == ids


def test_the_vocabulary_has_the_agreed_layout() -> None:
    assert TOKENIZER.vocab_size == HF.vocab_size == len(HF) == 6400
    assert [TOKENIZER.decode([i], skip_control=False) for i in range(15)] == list(CONTROL_TOKENS)
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.end_of_turn_id) == (1, 2, 3, 8)
    assert TOKENIZER.stop_ids == (2, 8)
    assert [HF.convert_tokens_to_ids(name) for name in CONTROL_TOKENS] == list(range(15))
    assert all(TOKENIZER.token_bytes[:15] == 0) and all(TOKENIZER.token_bytes[15:271] == 1)


def test_control_tokens_can_be_shown_and_left_out() -> None:
    ids = [1, 5, *TOKENIZER.encode("Hi 世"), 8, 2]
    assert TOKENIZER.decode(ids) == HF.decode(ids, skip_special_tokens=True) == "Hi 世"
    assert TOKENIZER.decode(ids, skip_control=False) == HF.decode(ids) == "<s><|user|>Hi 世<|end|></s>"


def test_hugging_face_adds_bos_as_in_training() -> None:
    assert HF("Hi")["input_ids"] == [TOKENIZER.bos_id, *TOKENIZER.encode("Hi")]
    assert (HF.bos_token_id, HF.eos_token_id, HF.pad_token_id, HF.unk_token_id) == (1, 2, 3, 0)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_hugging_face_reads_the_tokenizer_beside_a_model_config(tmp_path: Path, model_type: str) -> None:
    """AutoTokenizer may choose a class by the model's type, and that class must not rebuild the tokenizer."""
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 6400}))
    reopened = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (" two  spaces ", "天地 <x>\n\n", SPACE_MARK):
        assert reopened.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert reopened.encode(text)[0] == TOKENIZER.bos_id


@given(st.lists(st.integers(0, 6399), max_size=40))
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(TOKENIZER.decode(ids), str)
    stream = TOKENIZER.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == TOKENIZER.decode(ids)


def test_the_stream_holds_back_unfinished_characters() -> None:
    first_byte = len(TOKENIZER.control_ids)
    stream = TOKENIZER.stream_decoder()
    assert [stream.push(first_byte + byte) for byte in "世".encode()] == ["", "", "世"]
    assert stream.push(first_byte + 0xE4) == "" and stream.flush() == "\ufffd"


def test_ids_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="6400 is outside the vocabulary"):
        TOKENIZER.decode([6400])


def test_a_lone_surrogate_is_named() -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_one_token_for_display() -> None:
    assert [TOKENIZER.token_text(i) for i in (8, 15 + 0xE4)] == ["<|end|>", "<0xE4>"]
    assert "".join(map(TOKENIZER.token_text, TOKENIZER.encode("the sea"))) == "the sea"


def test_batches_equal_single_texts() -> None:
    texts = ["", "one", f"two {SPACE_MARK}", "三\n"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert isinstance(again, Tokenizer)
    assert again.fingerprint == TOKENIZER.fingerprint
    again.save(tmp_path / "model")  # into itself: nothing to do
    assert again.encode("the same") == TOKENIZER.encode("the same")


def test_the_fingerprint_follows_model_and_template(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("another")
    assert Tokenizer(tmp_path).fingerprint != TOKENIZER.fingerprint


def test_a_tokenizer_travels_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode("over there") == TOKENIZER.encode("over there")


def test_folders_without_our_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected a folder with tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not this project's tokenizer"):
        Tokenizer(tmp_path)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    tokenizer = load_tokenizer(make_foreign_folder(tmp_path_factory.mktemp("foreign")))
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def test_a_foreign_tokenizer_has_the_same_interface(foreign: HFTokenizer, tmp_path: Path) -> None:
    text = "<|im_end|> 世界"
    ids = foreign.encode(text)
    assert foreign.decode(ids) == text
    assert not foreign.control_ids.intersection(ids)
    assert foreign.encode_batch([text]) == [ids]
    assert foreign.encode_template("<|im_end|>") == [258]
    assert (foreign.vocab_size, foreign.bos_id, foreign.eos_id, foreign.pad_id) == (259, None, 256, 256)
    assert foreign.decode([258, *ids[-6:]], skip_control=False) == "<|im_end|>世界"
    assert sum(foreign.token_bytes[ids]) == len(text.encode()) and sum(foreign.token_bytes[256:]) == 0
    foreign.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == foreign.fingerprint


def test_a_foreign_end_of_turn_is_read_from_the_template(foreign: HFTokenizer) -> None:
    assert (foreign.end_of_turn_id, foreign.stop_ids) == (258, (256, 258))


def test_a_foreign_stream_holds_back_unfinished_characters(foreign: HFTokenizer) -> None:
    stream = foreign.stream_decoder()
    assert [stream.push(i) for i in foreign.encode("a世")] == ["a", "", "", "世"]
    stream.push(foreign.encode("世")[0])
    assert stream.flush() == "\ufffd"


def test_stop_ids_come_from_the_generation_config_too(tmp_path: Path) -> None:
    folder = make_foreign_folder(tmp_path, template=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (256, 257) and tokenizer.eos_id == 256


def test_a_sentencepiece_model_of_another_project_is_foreign(tmp_path: Path) -> None:
    folder = make_foreign_folder(tmp_path)
    shutil.copyfile(DEFAULT_TOKENIZER / "tokenizer_config.json", folder / "tokenizer.model")
    assert isinstance(load_tokenizer(folder), HFTokenizer)


def test_saving_a_tokenizer_leaves_no_file_of_another_one(tmp_path: Path) -> None:
    """The files of the one that was there before would decide what the folder's next reader gets."""
    foreign = load_tokenizer(make_foreign_folder(tmp_path / "foreign"))
    run = tmp_path / "run"
    TOKENIZER.save(run)
    (run / "config.json").write_text("{}")
    foreign.save(run)
    again = load_tokenizer(run)
    assert isinstance(again, HFTokenizer) and again.fingerprint == foreign.fingerprint
    TOKENIZER.save(run)
    assert isinstance(load_tokenizer(run), Tokenizer)
    assert {path.name for path in run.iterdir()} == {
        "config.json", *(path.name for path in DEFAULT_TOKENIZER.iterdir())
    }  # fmt: skip
