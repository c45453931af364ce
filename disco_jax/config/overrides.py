"""The `--config.FIELD=VALUE` flags, looked at before anything else is: every mistake at once."""

import ast
import re
from typing import Any

from disco_jax.config import default, flatten
from disco_jax.config.validation import of_a_set, unknown_field

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def check_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without those that can't be, and what is wrong with these, a line each."""
    known = flatten(default())
    usable, problems = [], []
    for argument in argv:
        matched = _OVERRIDE.fullmatch(argument)
        problem = ""
        if matched:
            negated, field, text = matched.groups()
            if field not in known and not of_a_set(field):
                problem = unknown_field(field)
            elif field in known and not negated and text is not None:
                problem = _of_type(field, known[field], text)
        if problem:
            problems.append(problem)
        else:
            usable.append(argument)
    return usable, problems


def _of_type(field: str, default_value: Any, text: str) -> str:
    """What is wrong with a value, if its text is not of the default's type."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (_boolean, "true or false"),
        int: (int, "a whole number"),
        float: (float, "a number"),
        tuple: (_numbers, "numbers, (2.0, 1.0) say"),
    }
    read, told = kinds.get(type(default_value), (str, "a text"))
    try:
        read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return f"{field} is {text!r}, and must be {told}"
    return ""


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _numbers(text: str) -> tuple[float, ...]:
    found = ast.literal_eval(text)
    return tuple(float(x) for x in (found if isinstance(found, tuple) else (found,)))
