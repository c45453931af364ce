"""Values in the other libraries' configs that need care."""

from typing import Any

from disco_jax.errors import UserError


def square(value: Any, field: str) -> int:
    """Returns the side of a square, given as a number or as a list of two equal ones.

    Raises:
      UserError: if it is neither; the message names `field`.
    """
    sides = value if isinstance(value, list | tuple) else [value]
    if not sides or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(f"{field} is {value!r}; it must be a positive integer")
    if len(set(sides)) > 1:
        raise UserError(f"{field} is {value!r}; only squares are supported")
    return sides[0]


def epsilon(value: Any, field: str) -> float:
    """Returns a LayerNorm's epsilon.

    Raises:
      UserError: if it is not a number between 0 and 1; the message names `field`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{field} is {value!r}; it must be a number between 0 and 1")
    return float(value)
