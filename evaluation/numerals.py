"""Numbers as people and models write them in a text, exactly.

    numbers_in("From 1,200 to 3/4, that is −１２．５")   ->   [1200, 3/4, -25/2]
    last_number("so 6 * 7 = 42.\\n#### 42")              ->   42

Read: thousands separators, decimals, exponents, fractions (also LaTeX's \\frac{3}{4}), full-width digits and signs, a
currency sign after the minus. Not read: percent as hundredths, numbers in words, digits of other scripts.
"""

import re
from fractions import Fraction

MARK = "####"  # what follows it is the final answer (GSM8K)
DIGITS = 100  # a run of more is no number, so that none takes time or memory
FULL_WIDTH = {ord("０") + i: str(i) for i in range(10)} | {ord(a): b for a, b in zip("．／－＋−", "./-+-", strict=True)}
SEPARATED = re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))")  # else the full-width comma ends a clause
LATEX = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])(?P<sign>[-+])\s?)?(?<![0-9.])[$€£¥￥]?(?P<number>{UNSIGNED})"
    r"(?:[eE](?P<exponent>[-+]?[0-9]+)|/(?P<below>[0-9]+)(?![0-9]*[/.][0-9]))?"
)
CLOSE = Fraction(1, 10**6)


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in turn."""
    text = SEPARATED.sub(",", text).translate(FULL_WIDTH)
    text = LATEX.sub(r"\1/\2", text)
    found: list[Fraction] = []
    for match in NUMBER.finditer(text):
        digits, below, exponent = match["number"].replace(",", ""), match["below"], match["exponent"] or "0"
        if max(len(digits), len(below or "")) > DIGITS or len(exponent) > 3:
            continue
        value = Fraction(f"{match['sign'] or ''}{digits}e{exponent}")
        if not below:
            found.append(value)
        elif int(below) == 0 or text[match.start() - 1 : match.start()] == "/":  # 5/0, and the rest of 2024/05/06
            found += [value, Fraction(int(below))]
        else:
            found.append(value / int(below))
    return found


def last_number(text: str) -> Fraction | None:
    """The last number behind the last ####, where there is one; else the last of the text. None where there is none."""
    return next(reversed(numbers_in(text.rpartition(MARK)[2])), None)


def same(found: Fraction, expected: Fraction) -> bool:
    """Equal to a millionth; of `expected`, where that is smaller than 1. Programs write 0.30000000000000004."""
    return abs(found - expected) <= CLOSE * min(Fraction(1), abs(expected))
