"""The calculator: right where Python's own exact arithmetic says what is right, and quick to refuse the rest."""

import random
from fractions import Fraction

import pytest

from evaluation.tools.calculator import DEPTH, DIGITS, LENGTH, CalculatorError, Parser, calculate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1 + 2) * 3 / 4", "2.25"),
        ("1/3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2^3^2", "512"),
        ("2**-2", "0.25"),
        ("-2^2", "-4"),
        ("--3", "3"),
        ("7//2 + 7%3", "4"),
        ("-7 // 2", "-4"),
        ("3!! + 0!", "721"),
        ("sqrt(16/9) * 3", "4"),
        ("sqrt(2)", "1.41421356237"),
        ("2^0.5", "1.41421356237"),
        ("round(2.5) + round(-2.675, 2)", "0.32"),
        ("max(1, 2, min(5, 3)) + abs(-1) + floor(1.5) + ceil(1.5)", "7"),
        ("pi", "3.14159265359"),
        ("（１＋２）×３÷２－１", "3.5"),
        ("1e5 + .5e1", "100005"),
        ("1**99999999999", "1"),
        ("(-1)^100000000001", "-1"),
        ("0^0", "1"),
    ],
)
def test_what_is_calculated(text: str, expected: str) -> None:
    assert calculate(text) == expected


def test_random_expressions_have_the_value_that_python_gives_them() -> None:
    rng = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 20))
        left, right = expression(depth - 1), expression(depth - 1)
        kind = rng.choice(["{} + {}", "{} - {}", "{}*{}", "{} / {}", "({} - {})", "-{} * ({})", "({})**{}"])
        return kind.format(left, right if "**" not in kind else rng.randint(0, 3))

    checked = 0
    for _ in range(600):
        text = expression(3)
        exact = " ".join(f"F({token})" if token.isdigit() else token for token in split(text))
        try:
            expected = eval(exact, {"F": Fraction})
        except ZeroDivisionError:
            with pytest.raises(CalculatorError, match="division by zero"):
                Parser(text).value()
            continue
        assert Parser(text).value() == expected, text
        checked += 1
    assert checked > 300


def split(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " ** " if c == "^" else f" {c} " for c in text).replace("*  *", "**").split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9**9**9", "more than 300 digits"),
        ("9^9^9^9^9^9", "more than 300 digits"),
        ("10^299 * 10", "more than 300 digits"),
        ("(1/7)^2000", "more than 300 digits"),
        ("2^(1/2)^3000", "more than 300 digits"),
        ("((9^99)^3)!", "more than 300 digits"),
        ("100000!", "more than 300 digits"),
        ("3!!!", "more than 300 digits"),
        ("1e400", "the exponent 400 is too large"),
        ("1e99999999999999999999", "is too large"),
        ("10^250.5 * 10^250.5", "more than 300 digits"),
        ("(" * 90 + "1" + ")" * 90, "brackets and signs"),
        ("-" * 150 + "1", "brackets and signs"),
        ("2^" * 90 + "1", "brackets and signs"),
        ("1+" * 1000 + "1", f"at most {LENGTH}"),
        ("9" * 10000, f"at most {LENGTH}"),
        ("1/0", "division by zero"),
        ("1 // 0", "division by zero"),
        ("1 % (1-1)", "division by zero"),
        ("0^-1", "division by zero"),
        ("sqrt(-1)", "no real square root"),
        ("(-8)^(1/3)", "no real power"),
        ("1.5!", "whole numbers"),
        ("(-1)!", "whole numbers"),
        ("nan", "found 'nan' as part 1"),
        ("inf - inf", "found 'inf'"),
        ("٣ + 1", "found '٣'"),
        ("2²", "found '²' as part 2"),
        ("1,234 * 5", "without thousands separators"),
        ("1_000", "found '_'"),
        ("0x10", "found 'x'"),
        ("5 5", "expected an operator or the end"),
        ("1 +", "found the end as part 3"),
        ("", "nothing to calculate"),
        ("(1", "found the end as part 3, expected ')'"),
        ("round(1, 10^9)", "at most 12"),
        ("sqrt(1, 2)", "sqrt takes 1 value"),
        ("__import__('os').system('true')", "found '_'"),
        ("().__class__", "found ')'"),
        ("lambda: 1", "found 'lambda'"),
        ("1 if 1 else 1", "found 'if'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(CalculatorError, match=message.replace("(", r"\(").replace(")", r"\)")):
        calculate(text)


def test_nothing_that_fits_raises_another_error_or_gets_large() -> None:
    """Random rubbish of the calculator's own words."""
    rng = random.Random(1)
    words = [*"0123456789+-*/%^!().,", "**", "//", "e9", "1e", "sqrt(", "round(", "max(", "pi", "e", "9^99", "1/3", " "]
    values = 0
    for _ in range(4000):
        text = "".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        try:
            assert len(calculate(text)) <= DIGITS + 2, text
            values += 1
        except CalculatorError:
            pass
    assert values > 100
    assert calculate("(" * DEPTH + "1" + ")" * DEPTH) == "1"
