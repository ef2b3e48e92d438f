"""GGUF files: read back with gguf, and opened by llama.cpp, which gives the same ids, logits and answers."""

import contextlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dataset import DEFAULT_TOKENIZER, TextTokenizer, load_tokenizer, render_chat
from export.gguf_file import write_gguf
from export.modelfile import go_template
from export.vocabulary import vocabulary
from model import GPT, generate
from tests.dataset.foreign import FAMILIES, make_foreign_folder

TEXTS = [
    "Hello, how are you today?",
    "你好，世界。今天天气怎么样？\n\n明天呢？",
    "Привет, как дела? Γειά σου. مرحبا بالعالم. שלום. नमस्ते दुनिया. สวัสดี 안녕하세요 こんにちは",
    "🙂 👩‍👩‍👧 🏳️‍🌈 é ñ ø ß ﬁ ½ ² Ⅳ ① ٣",
    "3.14159 1234567890 00 1,000,000 0x1F",
    "a  b   c    d\t\te \n \n\n\n  f ",
    "   leading and trailing   ",
    "def f(x):\r\n\r\n    return x  # one\n\n\n```\n{\"a\": [1, 2]}\n```",
    "<|im_start|>user <|user|>x<|end|> <s></s> <unk> <|endoftext|> <|eot_id|> [INST] <0x41>",
    "don't WON'T it's we'll I'D",
    "\x00\x01\x7f control \u200b\u00a0\u3000 spaces",
    "",
    " ",
    "x",
    "𠀀𝔘𐍈 rare 㐀 characters 龘",
]  # fmt: skip


def ids_there(llama, text: str, special: bool = False) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=False, special=special) if text else []


@pytest.fixture
def opened(tmp_path):
    """opened(model, tokenizer) -> llama_cpp.Llama of the file written; skipped where llama.cpp is not there."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs `pip install llama-cpp-python`, the extra llamacpp")
    settings = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    settings |= dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # the cache; of 16 bits by itself
    with contextlib.ExitStack() as stack:

        def load(model: GPT, tokenizer: TextTokenizer):
            path = tmp_path / f"{len(list(tmp_path.glob('*.gguf')))}.gguf"
            write_gguf(model, tokenizer, path, "f32", "test")
            return stack.enter_context(contextlib.closing(llama_cpp.Llama(str(path), **settings)))

        yield load


def logits_there(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


SHAPES = {
    "llama": {},
    "llama, untied": {"tie_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "qwen3, untied": {"qk_norm": True, "tie_embeddings": False},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_the_same_logits_and_the_same_text(opened, make_model, tokenizer, shape):
    model = make_model(vocab_size=6400, dim=64, ffn_dim=96, max_seq_len=256, norm_eps=1e-5, **SHAPES[shape])
    llama = opened(model, tokenizer)
    ids = torch.randint(15, 6400, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = model(torch.tensor([ids]))[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_there(llama, ids), expected, atol=2e-3, rtol=0)
    (answer,) = generate(model, [ids[:40]], max_new_tokens=64, temperature=0)
    llama.reset()
    there = llama.generate(ids[:40], temp=0.0, repeat_penalty=1.0)
    assert [next(there) for _ in range(64)] == answer.ids


def test_ids_are_those_of_our_tokenizer(opened, make_model, tokenizer):
    llama = opened(make_model(vocab_size=6400), tokenizer)
    assert [ids_there(llama, text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_texts_with_other_ids_are_those_that_the_notes_name(opened, make_model, tokenizer, tmp_path):
    notes = write_gguf(make_model(vocab_size=6400), tokenizer, tmp_path / "x", "f16", "x")
    assert len(notes) == 2 and "U+2581" in notes[0] and "<think>" in notes[1]
    llama = opened(make_model(vocab_size=6400), tokenizer)
    assert ids_there(llama, "a\u2581b") == tokenizer.encode("a b") != tokenizer.encode("a\u2581b")
    assert ids_there(llama, "<think>") == [tokenizer.token_id("<think>")]


def llama2_with_all_merges(folder: Path) -> Path:
    """As Llama 2's own: every pair of pieces that makes a third is a merge."""
    FAMILIES["llama2"](folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    content["model"]["merges"] = [
        [piece[:cut], piece[cut:]]
        for piece in dict.fromkeys("".join(pair) for pair in merges)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


FOREIGN = {name: FAMILIES[name] for name in ("llama3", "qwen3")} | {"llama2": llama2_with_all_merges}


@pytest.mark.parametrize("family", FOREIGN)
def test_ids_and_answers_are_those_of_a_foreign_tokenizer(opened, make_model, tmp_path, family):
    theirs = load_tokenizer(FOREIGN[family](tmp_path / family))
    model = make_model(vocab_size=theirs.vocab_size + 7, qk_norm=family == "qwen3", max_seq_len=256)
    llama = opened(model, theirs)
    texts = [text.replace("</s>", "") for text in TEXTS] if family == "llama2" else TEXTS  # as a note says
    assert [ids_there(llama, text) for text in texts] == [theirs.encode(text) for text in texts]
    prompt = render_chat(theirs, CHAT, add_generation_prompt=True).ids
    assert ids_there(llama, theirs.apply_template(CHAT, None, True), special=True) == prompt


CHAT = [
    {"role": "user", "content": "你好, who are you?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And   now? 🙂"},
]


def test_a_chat_is_answered_as_we_answer_it(opened, make_model, tokenizer):
    """By the template in the file; what an answer holds between <think> and </think> is shown."""
    model = make_model(vocab_size=6400, dim=64, max_seq_len=256)
    llama = opened(model, tokenizer)
    prompt = render_chat(tokenizer, CHAT, add_generation_prompt=True).ids
    (answer,) = generate(model, [prompt], max_new_tokens=40, temperature=0, stop_ids=tokenizer.stop_ids)
    there = llama.create_chat_completion(CHAT, max_tokens=40, temperature=0.0, repeat_penalty=1.0)
    assert there["usage"]["prompt_tokens"] == len(prompt)
    shown = tokenizer.decode([i for i in answer.ids if i not in HIDDEN], skip_control=False)
    assert there["choices"][0]["message"]["content"] == shown.replace(
        "\ufffd", ""
    )  # halves of characters it leaves out


HIDDEN = {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12}  # control tokens that llama.cpp does not show


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize(("dtype", "within"), [("f16", 1e-3), ("q8_0", 1e-2)])
def test_weights_and_settings_are_read_back(tmp_path, make_model, tokenizer, dtype, within):
    model = make_model(vocab_size=6403, dim=64, n_kv_heads=2, max_seq_len=77)
    write_gguf(model, tokenizer, tmp_path / "x.gguf", dtype, "x")
    fields, tensors = read(tmp_path / "x.gguf")
    assert (fields["general.architecture"], fields["llama.context_length"], fields["llama.vocab_size"]) == (
        "llama",
        77,
        6403,
    )
    assert fields["tokenizer.ggml.tokens"][5] == "<|user|>" and fields["tokenizer.ggml.tokens"][6400:] == [
        "[PAD6400]",
        "[PAD6401]",
        "[PAD6402]",
    ]
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 8, 9, 15, 300, 6401)] == [2, 3, 3, 4, 6, 1, 5]
    assert fields["tokenizer.chat_template"] == (DEFAULT_TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8")
    weights = model.state_dict()
    close(tensors["token_embd.weight"], weights["model.embed_tokens.weight"], within)
    close(tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"], within)
    keys = tensors["blk.1.attn_k.weight"].reshape(2, 8, 2, 64).transpose(0, 2, 1, 3).reshape(32, 64)
    close(keys, weights["model.layers.1.self_attn.k_proj.weight"], within)
    close(tensors["blk.0.attn_norm.weight"], weights["model.layers.0.input_layernorm.weight"], 0)


def test_matrices_that_q8_0_cannot_hold_stay_16_bits_and_are_counted(tmp_path, make_model, tokenizer):
    model = make_model(vocab_size=6400)  # rows of 32, and of 48 in two down projections
    assert write_gguf(model, tokenizer, tmp_path / "x.gguf", "q8_0", "x")[-1].startswith("2 matrices have rows")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert (
        kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    )
    assert kinds["output_norm.weight"] == "F32"


def close(found: np.ndarray, expected: torch.Tensor, within: float) -> None:
    """Relative to the largest weight."""
    assert np.abs(found - expected.numpy()).max() <= within * expected.abs().max().item()


def test_what_gguf_has_no_place_for_is_refused(tmp_path, make_model, tokenizer):
    with pytest.raises(ValueError, match="reward model"):
        write_gguf(make_model(vocab_size=6400, scores=True), tokenizer, tmp_path / "x", "f16", "x")
    split = load_tokenizer(make_foreign_folder(tmp_path / "split"))
    with pytest.raises(ValueError, match=r"llama.cpp cannot split text like this tokenizer .*gpt-2, smollm, llama-bpe"):
        write_gguf(make_model(vocab_size=300), split, tmp_path / "x", "f16", "x")
    some = load_tokenizer(FAMILIES["llama2"](tmp_path / "some"))
    with pytest.raises(ValueError, match=r"5 such pairs are no merges \(\[\('h', 'er'\)"):
        write_gguf(make_model(vocab_size=900), some, tmp_path / "x", "f16", "x")


def test_names_that_pieces_join_to_are_noted(tmp_path, make_model):
    theirs = load_tokenizer(llama2_with_all_merges(tmp_path / "llama2"))
    assert vocabulary(theirs, theirs.vocab_size).notes[0].startswith("</s>: read as the token of that name")


@pytest.mark.parametrize("family", ["ours", "llama3", "chatml"])
def test_the_template_for_ollama_writes_what_our_renderer_writes(tmp_path, tokenizer, family):
    chats = tokenizer if family == "ours" else load_tokenizer(FAMILIES[family](tmp_path / family))
    template = go_template(chats)
    assert template is not None
    system, rest = template.removeprefix("{{ if .System }}").split("{{ end }}")
    asked, end = rest.split("{{ .Response }}")
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    written = system.replace("{{ .System }}", "Be brief.") + asked.replace("{{ .Prompt }}", CHAT[0]["content"])
    written += CHAT[1]["content"] + end + asked.replace("{{ .Prompt }}", CHAT[2]["content"])
    ids = render_chat(chats, messages, add_generation_prompt=True).ids
    assert written == chats.decode(ids[chats.bos_id is not None :], skip_control=False)


def test_a_form_that_changes_from_round_to_round_gets_no_template(tmp_path):
    assert go_template(load_tokenizer(FAMILIES["llama2"](tmp_path / "llama2"))) is None
