"""Numbers in texts, as people and models write them."""

from fractions import Fraction

import pytest

from evaluation.numerals import last_number, numbers_in, same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("From 1,200 to 3/4", ["1200", "3/4"]),
        ("$1,234,567.89, or -$5 and +7", ["1234567.89", "-5", "7"]),
        ("１２．５ and －３，", ["12.5", "-3"]),
        ("共３，４００元，不是３，４", ["3400", "3", "4"]),  # the full-width comma separates thousands, or clauses
        ("1,2,3 and 12,34", ["1", "2", "3", "12", "34"]),  # lists, not thousands
        ("10-3=7, x=-7, (5)-2, a - 5", ["10", "3", "7", "-7", "5", "2", "-5"]),
        (r"\frac{3}{4} of \dfrac{ 1 }{ 2 }", ["3/4", "1/2"]),
        ("1e5, 2.5E-3 and .5", ["100000", "0.0025", "0.5"]),
        ("on 2024/05/06, and 5/0", ["2024", "5", "6", "5", "0"]),  # dates are no fractions
        ("50%, 3. And", ["50", "3"]),
        ("٣ ² half nan inf", []),
        ("", []),
    ],
)
def test_numbers_are_read_exactly(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Fraction(each) for each in expected]


@pytest.mark.parametrize("text", ["1e999999999", "9" * 5000, "1/" + "7" * 5000, "1e-1234"])
def test_a_number_that_would_take_memory_is_none(text: str) -> None:
    assert all(abs(number) < 10 for number in numbers_in(text))


def test_the_last_number_is_the_one_behind_the_mark() -> None:
    assert last_number("6 * 7 = <<6*7=42>>42\n#### 1,042") == 1042
    assert last_number("#### none, but 5 before") == 5
    assert last_number("5 #### none") is None
    assert last_number("no number") is None


def test_numbers_are_the_same_to_what_a_program_rounds_and_no_more() -> None:
    assert same(Fraction("0.30000000000000004"), Fraction("0.3")) and same(Fraction(0), Fraction(0))
    assert same(Fraction("0.3333333"), Fraction(1, 3))
    assert not same(Fraction(12345679), Fraction(12345678))
    assert not same(Fraction("0.0000001"), Fraction("0.0000002")) and not same(Fraction("1e-9"), Fraction(0))
