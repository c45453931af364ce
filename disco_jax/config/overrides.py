"""Checks the `--config.FIELD=VALUE` flags up front and reports all mistakes together."""

import ast
import re
from typing import Any

from disco_jax.config import default, flatten
from disco_jax.config.validation import of_a_set, unknown_field

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def check_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the valid arguments, and one message for each invalid override."""
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
    """Returns an error message if `text` does not parse as the default's type, else ""."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (_boolean, "true or false"),
        int: (int, "an integer"),
        float: (float, "a number"),
        tuple: (_numbers, "a tuple of numbers, e.g. (2.0, 1.0)"),
    }
    read, kind = kinds.get(type(default_value), (str, "a string"))
    try:
        read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return f"{field} is {text!r}; it must be {kind}"
    return ""


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _numbers(text: str) -> tuple[float, ...]:
    found = ast.literal_eval(text)
    return tuple(float(x) for x in (found if isinstance(found, tuple) else (found,)))
