"""Terminal output: text is printed verbatim, except that control characters are escaped.

Names of files, classes, sets and tar members are untrusted. They are never parsed as markup, and
anything unprintable (escape sequences, surrogates, text direction marks) is escaped.
"""

import sys
import warnings
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text


def printable(text: object, keep: str = "") -> str:
    r"""Returns the text with every unprintable character escaped, e.g. as `\x1b`.

    Args:
      text: Any object; it is converted with `str`.
      keep: Characters that are not escaped, e.g. "\n".
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def say(text: object, file: TextIO | None = None) -> None:
    """Prints one line to standard output or another stream, and flushes it."""
    print(printable(text), file=file or sys.stdout, flush=True)


def ignore_warnings_of_pillow() -> None:
    """Ignores them in this process: what is wrong with an image is reported as a bad sample."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


class PlainConsole(Console):
    """Rich's console for tables and bars, with every string treated as plain text."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders every string that is printed, including those in tables."""
        return super().render_str(printable(text, keep="\n"), **options)


console = PlainConsole()  # silenced in every process but the first
