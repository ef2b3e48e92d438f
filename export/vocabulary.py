"""A tokenizer as llama.cpp knows it: pieces by id with their kinds, and what joins them.

    the shipped tokenizer   Vocabulary(model="llama", tokens=["<unk>", "<s>", ..., "\\u2581t", "he", ...],
                                       scores=[0, 0, ..., -0.0, -1.0, ...])          SentencePiece: pieces by score
    a folder of Qwen3's     Vocabulary(model="gpt2", pre="qwen2", tokens=["!", ..., "\\u0120the"],
                                       merges=["\\u0120 t", "h e", ...])             bytes, joined within words

llama.cpp has one splitter into words for each `pre`, compiled in: a tokenizer with any other cannot be said in a file.
Where some texts get other ids there all the same, `notes` say which and why.
"""

import json
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import TokenType

from dataset.tokenizer import CONTROL_TOKENS, SPACE_MARK, HFTokenizer, TextTokenizer, Tokenizer

SHOWN = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})  # an answer may hold them

GPT2_WORDS = "ByteLevel"  # the words that this step of Hugging Face's makes by itself are GPT-2's
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    (GPT2_WORDS,): "gpt-2",
    ("Digits", GPT2_WORDS): "smollm",
    (CONTRACTIONS + r"\p{N}{1,3}" + SIGNS_AND_SPACE,): "llama-bpe",
    (CONTRACTIONS + r"\p{N}" + SIGNS_AND_SPACE,): "qwen2",
}
"""What splits a text into words, one entry a step -> llama.cpp's name for it."""

SPACE_NOTE = "a literal U+2581 is read as a space: llama.cpp writes spaces as that character and cannot tell them apart"
NFC_NOTE = "characters written as letter and accent apart get other ids: llama.cpp does not compose them (NFC)"


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer; lists are by id."""

    model: str  # "llama": SentencePiece's kind, "gpt2": byte-level merges
    pre: str  # which words merges stay within
    tokens: list[str]
    types: list[int]  # of gguf.TokenType
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False  # whether a space is put before a text
    notes: list[str] = field(default_factory=list)

    def padded(self, size: int) -> "Vocabulary":
        """With names for the rows of an embedding that stand for no token."""
        missing = range(len(self.tokens), size)
        self.tokens += [f"[PAD{i}]" for i in missing]
        self.types += [TokenType.UNUSED] * len(missing)
        self.scores += [-1e6] * len(missing) if self.scores else []
        return self


def vocabulary(tokenizer: TextTokenizer, size: int) -> Vocabulary:
    """`size` is the rows of the embedding. Raises ValueError for a kind of tokenizer that llama.cpp does not have."""
    if isinstance(tokenizer, Tokenizer):
        return sentencepiece_vocabulary(tokenizer.folder).padded(size)
    assert isinstance(tokenizer, HFTokenizer)
    inside = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = inside["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{tokenizer.folder}: found a tokenizer of the kind {model['type']}, GGUF is written for BPE")
    build = score_vocabulary if model.get("byte_fallback") else merge_vocabulary
    made = build(tokenizer, inside)
    shown = sorted(made.tokens[i] for i, kind in enumerate(made.types) if kind == TokenType.USER_DEFINED)
    if shown:
        made.notes.append(shown_note(shown))
    return made.padded(size)


def shown_note(names: list[str]) -> str:
    return (
        f"{' '.join(names)} are read as the tokens they name also in plain text: "
        "so marked, llama.cpp shows them where an answer holds them, and control tokens it hides"
    )


def sentencepiece_vocabulary(folder: Path) -> Vocabulary:
    """This project's own."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.get_piece_size())
    kinds = [TokenType.BYTE if model.is_byte(i) else TokenType.NORMAL for i in ids]
    for i, name in enumerate(CONTROL_TOKENS):
        kinds[i] = TokenType.USER_DEFINED if name in SHOWN else TokenType.CONTROL
    kinds[CONTROL_TOKENS.index("<unk>")] = TokenType.UNKNOWN
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[model.id_to_piece(i) for i in ids],
        types=list(kinds),
        scores=[model.get_score(i) for i in ids],
        notes=[SPACE_NOTE, shown_note(sorted(SHOWN))],
    )


def merge_vocabulary(tokenizer: HFTokenizer, inside: dict[str, Any]) -> Vocabulary:
    """Byte-level merges, as Llama 3 and Qwen3 have them. Raises ValueError where llama.cpp has no such words."""
    model, words = inside["model"], tuple(word_steps(inside["pre_tokenizer"]))
    pre, changes = PRE.get(words), steps(inside["normalizer"], "normalizers")
    if pre is None or not model["merges"] or any(step["type"] != "NFC" for step in changes):
        raise ValueError(
            f"{tokenizer.folder}: llama.cpp cannot split text like this tokenizer (normalizer {inside['normalizer']}, "
            f"pre_tokenizer {' then '.join(words) or 'none'}); it can where the words are {', '.join(PRE.values())}'s"
        )
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise ValueError(
            f"{tokenizer.folder}: ignore_merges is {model.get('ignore_merges')} in tokenizer.json, and with the words "
            f"of {pre} llama.cpp has it the other way"
        )
    tokens, types = pieces(tokenizer, model["vocab"])
    merges = [" ".join(pair) for pair in merge_pairs(model)]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, notes=[NFC_NOTE] * bool(changes))


def steps(step: dict[str, Any] | None, within: str) -> list[dict[str, Any]]:
    """What a part of tokenizer.json does, one after another; `within` is what a Sequence of such parts calls them."""
    if step is None:
        return []
    return [each for part in step[within] for each in steps(part, within)] if step["type"] == "Sequence" else [step]


def word_steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """{"type": "Sequence", "pretokenizers": [Split(pattern), ByteLevel()]} -> [pattern]; unknown steps as they are."""
    words = []
    for step in steps(pre_tokenizer, "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            words += step["pattern"].values()
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            words += [GPT2_WORDS] * step.get("use_regex", True)
        elif step["type"] == "Digits" and step["individual_digits"]:
            words.append("Digits")
        else:
            words.append(json.dumps(step))
    return words


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """["t h", ...] of older files and [["t", "h"], ...] of newer ones -> [("t", "h"), ...]"""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def score_vocabulary(tokenizer: HFTokenizer, inside: dict[str, Any]) -> Vocabulary:
    """Pieces with spaces as U+2581 and a fall-back to bytes, as Llama 2 has them: the score of a piece is when it is
    merged. Raises ValueError where merges say more than scores can."""
    model = inside["model"]
    vocab, pairs = model["vocab"], merge_pairs(model)
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, i)
    unlisted = sorted({pair for piece in rank for pair in halves(piece, vocab)}.difference(pairs))
    prefix = space_prefix(inside)
    if unlisted or prefix is None:
        raise ValueError(
            f"{tokenizer.folder}: llama.cpp writes spaces as U+2581 and joins any two pieces that make a third; here "
            f"the normalizer is {inside['normalizer']}, the pre_tokenizer {inside['pre_tokenizer']}, and "
            f"{len(unlisted)} such pairs are no merges ({unlisted[:2]}): its ids would differ"
        )
    tokens, types = pieces(tokenizer, vocab)
    types = [TokenType.BYTE if is_byte_piece(name) else kind for name, kind in zip(tokens, types, strict=True)]
    scores = [-float(rank.get(name, len(rank))) for name in tokens]
    names = [name for name in tokens if name not in rank and halves(name, vocab)]
    note = f"{' '.join(names)}: read as the token of that name also in plain text, where pieces join to it"
    return Vocabulary("llama", "default", tokens, types, scores, space_prefix=prefix, notes=[note] * bool(names))


def halves(piece: str, vocab: Container[str]) -> list[tuple[str, str]]:
    """Every way to cut a piece in two pieces."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in vocab and right in vocab]


def space_prefix(inside: dict[str, Any]) -> bool | None:
    """Whether spaces become U+2581 with one more before a text; None where something else is done to it."""
    changes = steps(inside["normalizer"], "normalizers")
    words = steps(inside["pre_tokenizer"], "pretokenizers")
    plain = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    if not words and plain in changes:
        rest = [step for step in changes if step != plain]
        return bool(rest) if rest in ([], [{"type": "Prepend", "prepend": SPACE_MARK}]) else None
    if not changes and len(words) == 1 and words[0]["type"] == "Metaspace" and not words[0].get("split", True):
        return {"never": False, "first": True, "always": True}.get(words[0]["prepend_scheme"])
    return None


def is_byte_piece(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def pieces(tokenizer: HFTokenizer, vocab: dict[str, int]) -> tuple[list[str], list[int]]:
    """Names and kinds by id. What is added without being called special is shown, as <think> of Qwen3's."""
    names = {i: piece for piece, i in vocab.items()}
    added = tokenizer.hf.added_tokens_decoder
    names |= {i: token.content for i, token in added.items()}
    kinds = {i: TokenType.CONTROL if token.special else TokenType.USER_DEFINED for i, token in added.items()}
    if tokenizer.unk_id is not None and tokenizer.unk_id in added:
        kinds[tokenizer.unk_id] = TokenType.UNKNOWN
    ids = range(max(names) + 1)
    tokens = [names.get(i, f"[PAD{i}]") for i in ids]
    return tokens, [kinds.get(i, TokenType.NORMAL if i in names else TokenType.UNUSED) for i in ids]
