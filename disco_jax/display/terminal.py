"""What reaches a terminal: texts as they are, but for what would control it.

Names of files, classes, sets and members of tars are anybody's. None of it is markup, and what is
not printable (escape sequences, surrogates, marks that change the direction of writing) is escaped.
"""

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text


def printable(text: object, keep: str = "") -> str:
    r"""The text with every character that is not printable as its escape, `\x1b` say.

    Args:
      text: anything that has a text.
      keep: characters that stay, "\n" say.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def say(text: object, file: TextIO | None = None) -> None:
    """Prints one line, at once, to standard output or another stream."""
    print(printable(text), file=file or sys.stdout, flush=True)


class PlainConsole(Console):
    """Rich's console for tables and bars, to which every string is plain text."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Of every string that is printed, in a table too."""
        return super().render_str(printable(text, keep="\n"), **options)


console = PlainConsole()  # silenced in every process but the first
