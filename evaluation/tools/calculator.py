"""Arithmetic by a grammar of its own: a text in, exact fractions within, a text out. Nothing in it is ever run as code.

    calculate("(1 + 2) * 3 / 4")  -> "2.25"          calculate("2^10")     -> "1024"
    calculate("1/3")              -> "0.333333333333"  calculate("9**9**9")  -> CalculatorError: the result has more ...

    sum      product (("+" | "-") product)*
    product  signed (("*" | "/" | "//" | "%") signed)*          % is the remainder
    signed   ("-" | "+") signed | power
    power    postfix (("**" | "^") signed)?                      binds to the right: 2^3^2 = 2^9
    postfix  atom "!"*
    atom     number | name "(" sum ("," sum)* ")" | "pi" | "e" | "(" sum ")"

A model writes what is calculated, so every step is bounded before it is taken: LENGTH characters, DEPTH brackets and
signs within each other, DIGITS digits above and below every fraction line, which bounds exponents and factorials.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction

LENGTH = 200
DEPTH = 30
DIGITS = 300
SHOWN = 12  # significant digits of what is no integer
BITS = int(DIGITS * math.log2(10))
FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # （１＋２） -> (1+2)
SIGNS = str.maketrans(FULL_WIDTH | {ord(a): b for a, b in zip("×·÷−–⋅∗", "**/--**", strict=True)})
TOKEN = re.compile(r"[ \t\n]*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\*\*|//|[a-z]+|\S)")


class CalculatorError(ValueError):
    """What cannot be calculated, and why; a model reads it."""


def calculate(text: str) -> str:
    """The value of an expression: an integer in full, anything else to SHOWN significant digits.

    Raises CalculatorError for what is no expression, has no value, or is too large.
    """
    return show(Parser(text).value())


def show(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{approximate(value):.{SHOWN}g}"


class Parser:
    """One expression; each method reads what is named after it in the grammar, from the token at `place` on."""

    def __init__(self, text: str) -> None:
        if len(text) > LENGTH:
            raise CalculatorError(f"found {len(text)} characters, at most {LENGTH} are calculated at once")
        self.tokens = TOKEN.findall(text.translate(SIGNS))
        self.place = self.depth = 0

    def value(self) -> Fraction:
        if not self.tokens:
            raise CalculatorError("found nothing to calculate")
        result = self.sum()
        if self.place < len(self.tokens):
            raise self.unexpected("an operator or the end")
        return result

    @property
    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token, where it is one of those wanted; else ""."""
        if (token := self.next) not in wanted:
            return ""
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.unexpected(repr(token))

    def unexpected(self, expected: str) -> CalculatorError:
        found = repr(self.next) if self.next else "the end"
        hint = "; numbers are written without thousands separators" if self.next == "," else ""
        return CalculatorError(f"found {found} as part {self.place + 1}, expected {expected}{hint}")

    def deeper(self, read: Callable[[], Fraction]) -> Fraction:
        self.depth += 1
        if self.depth > DEPTH:
            raise CalculatorError(f"found more than {DEPTH} brackets and signs within each other")
        result = read()
        self.depth -= 1
        return result

    def sum(self) -> Fraction:
        result = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            result = bounded(result + other if sign == "+" else result - other)
        return result

    def product(self) -> Fraction:
        result = self.signed()
        while operator := self.take("*", "//", "/", "%"):
            result = bounded(multiply_or_divide(operator, result, self.signed()))
        return result

    def signed(self) -> Fraction:
        if sign := self.take("-", "+"):
            value = self.deeper(self.signed)
            return -value if sign == "-" else value
        return self.power()

    def power(self) -> Fraction:
        base = self.postfix()
        return power(base, self.deeper(self.signed)) if self.take("**", "^") else base

    def postfix(self) -> Fraction:
        result = self.atom()
        while self.take("!"):
            result = factorial(result)
        return result

    def atom(self) -> Fraction:
        token = self.next
        if token[:1] in tuple("0123456789.") and token not in (".", ""):
            self.place += 1
            return number(token)
        if self.take("("):
            result = self.deeper(self.sum)
            self.expect(")")
            return result
        if token in CONSTANTS:
            self.place += 1
            return CONSTANTS[token]
        if token in FUNCTIONS:
            self.place += 1
            return FUNCTIONS[token](*self.arguments())
        known = f"a number, '(' or one of {', '.join([*CONSTANTS, *FUNCTIONS])}"
        raise self.unexpected(known)

    def arguments(self) -> list[Fraction]:
        self.expect("(")
        values = [self.deeper(self.sum)]
        while self.take(","):
            values.append(self.deeper(self.sum))
        self.expect(")")
        return values


# What is done with values; each raises CalculatorError instead of taking long -----------------------------------------


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise CalculatorError(f"the result has more than {DIGITS} digits")
    return value


def number(token: str) -> Fraction:
    exponent = re.split("[eE]", token)[1] if re.search("[eE]", token) else "0"
    if len(exponent) > 4 or abs(int(exponent)) > DIGITS:
        raise CalculatorError(f"the exponent {exponent[:20]} is too large, at most {DIGITS}")
    return bounded(Fraction(token))


def multiply_or_divide(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "*":
        return left * right
    if right == 0:
        raise CalculatorError("division by zero")
    return left / right if operator == "/" else Fraction(left // right) if operator == "//" else left % right


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for an integer exponent, else to a float's precision."""
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    if exponent.denominator != 1:
        if base < 0:
            raise CalculatorError("a negative number has no real power with this exponent")
        return real(lambda: approximate(base) ** approximate(exponent))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1  # 1 to any power stays 1
    if bits * abs(exponent.numerator) > BITS:
        raise CalculatorError(f"the result has more than {DIGITS} digits")
    if abs(base) in (0, 1):
        return base ** (exponent.numerator % 2 if exponent else 0) if base else Fraction(exponent == 0)
    return bounded(base**exponent.numerator)


def factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise CalculatorError("a factorial is taken of whole numbers from 0")
    if value > DIGITS // 2:  # 150! has 263 digits
        raise CalculatorError(f"the result has more than {DIGITS} digits")
    return bounded(Fraction(math.factorial(value.numerator)))


def square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise CalculatorError("a negative number has no real square root")
    exact = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return exact if exact * exact == value else real(lambda: math.sqrt(approximate(value)))


def rounded(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    """Halves away from zero, as people round; the language's own goes to even."""
    if digits.denominator != 1 or abs(digits) > SHOWN:
        raise CalculatorError(f"round takes a whole number of digits, at most {SHOWN}")
    scale = Fraction(10) ** digits.numerator
    away = (abs(value) * scale + Fraction(1, 2)) // 1 / scale
    return away if value >= 0 else -away


def real(calculate: Callable[[], float]) -> Fraction:
    try:
        return bounded(Fraction(repr(calculate())))  # the digits a float has, and no more
    except (OverflowError, ValueError, ZeroDivisionError):
        raise CalculatorError("the result is too large") from None


def approximate(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        raise CalculatorError("the number is too large here") from None


def function(name: str, do: Callable[..., Fraction], least: int = 1, most: int = 1) -> Callable[..., Fraction]:
    """`do` with a check of how many values it gets."""

    def checked(*values: Fraction) -> Fraction:
        if not least <= len(values) <= most:
            raise CalculatorError(f"{name} takes {least}{f' to {most}' if most > least else ''} values")
        return do(*values)

    return checked


CONSTANTS = {"pi": Fraction(math.pi), "e": Fraction(math.e)}
FUNCTIONS = {
    "sqrt": function("sqrt", square_root),
    "abs": function("abs", abs),
    "round": function("round", rounded, most=2),
    "floor": function("floor", lambda value: Fraction(math.floor(value))),
    "ceil": function("ceil", lambda value: Fraction(math.ceil(value))),
    "min": function("min", lambda *values: min(values), most=LENGTH),
    "max": function("max", lambda *values: max(values), most=LENGTH),
}
