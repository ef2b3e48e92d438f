"""How a text is worded, for answers that have no right or wrong: the words that two share, what comes again and again,
and the script. Words are those of any alphabet, and each character where words are written without spaces.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

LOOP_TIMES = 3  # a block of tokens that comes so often in a row is a loop ...
LOOP_TOKENS = 12  # ... where it is so long in all: "ha ha ha" is none

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han characters
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
HAN = re.compile(rf"[{UNSPACED}]")


def folded(text: str) -> str:
    """In one form, one case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """words_of("A cat, 两只猫!") -> ["a", "cat", "两", "只", "猫"]"""
    return WORD.findall(folded(text))


def overlap(text: str, reference: str) -> float:
    """The words, and pairs of neighbouring words, that both have: the mean of two F1, from 0 to 1 (ROUGE-1 and ROUGE-2
    of Lin 2004, https://aclanthology.org/W04-1013). A reference of one word has no pairs, and is judged by its word."""
    told, wanted = words_of(text), words_of(reference)
    scores = [f1(grams(told, n), grams(wanted, n)) for n in (1, 2) if len(wanted) >= n]
    return sum(scores) / len(scores) if scores else 0.0


def grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def f1(found: Counter[tuple[str, ...]], wanted: Counter[tuple[str, ...]]) -> float:
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def loops(tokens: Sequence[Hashable]) -> bool:
    """Whether a block of tokens, or of words, stands LOOP_TIMES or more times in a row, over at least LOOP_TOKENS.

    loops([5, 9] * 6) -> True: a block of 2 repeats over 12 tokens
    """
    for period in range(1, len(tokens) // LOOP_TIMES + 1):
        run = 0  # tokens that equal the one a period before
        for before, token in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if before == token else 0
            if run + period >= max(LOOP_TIMES * period, LOOP_TOKENS):
                return True
    return False


def unspaced(words: Sequence[str]) -> bool:
    """Whether more of the words are Han characters or kana than are not."""
    return 2 * sum(HAN.match(word) is not None for word in words) > len(words)
