"""The parser of the commands that take no config, and the printing of help."""

import argparse
import os
import sys
from typing import Any, NoReturn

from disco_jax.errors import UserError


def show_help(text: str) -> None:
    """Prints help, of which `head` or a pager may not read all."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what is left of it must not be written on exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Shows its description as it is written, and reports a mistake in one line."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, for which commands exit with 2."""
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Prints the help, to standard output unless `file` is given."""
        if file is None:
            show_help(self.format_help().rstrip())
        else:
            super().print_help(file)
