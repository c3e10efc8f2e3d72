"""What an equation comes to, without ever running it: `( 84.0 / 2.0 )` equals `42`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 1000
MAX_EXPONENT = 100
MAX_DIGITS = 1000  # of a numerator or denominator

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_WRITTEN = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**"})


def equation_match(answer: str, expected: str) -> float:
    """1 if both come to the same number, or are the same text; 0 for junk, a division by zero, numbers out of hand."""
    if answer.split() == expected.split():
        return 1.0
    value = equation_value(answer)
    return float(value is not None and value == equation_value(expected))


def equation_value(text: str) -> Fraction | None:
    """The number that an equation of + - * / ** and parentheses comes to, exactly; None where it is none."""
    if len(text) > MAX_CHARS:
        return None
    written = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip().rstrip(".").translate(_WRITTEN))
    written = re.sub(r"(?<![\d.])0+(?=\d)", "", written)  # Python reads no 007
    try:
        return _value(ast.parse(written, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Raises ValueError: not arithmetic. ZeroDivisionError."""
    match node:
        case ast.Constant(value=bool() | str() | bytes() | complex()):
            raise ValueError("not a number")
        case ast.Constant(value=int() | float() as number):
            return _bounded(Fraction(str(number)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = _value(right)
            if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
                raise ValueError("an exponent out of hand")
            return _bounded(Fraction(_value(left)) ** int(exponent))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
    raise ValueError("not arithmetic")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_DIGITS * 4:
        raise ValueError("a number out of hand")
    return value
