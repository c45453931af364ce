"""How a run ends: exit codes, and the exceptions behind them.

0: done. EXIT_USER: a mistake of the user's, told in one line. EXIT_PREEMPTED and EXIT_PEER_LOST:
the same command goes on. EXIT_INTERRUPTED: by Ctrl-C. Others are bugs.
"""

EXIT_USER = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_PEER_LOST = 76
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: entry points print it as one line and exit with code 2."""


class Preempted(Exception):
    """The run was told to stop, and is saved; all of its processes stop at the same step."""
