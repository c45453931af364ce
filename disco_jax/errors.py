"""How a run ends: exit codes, and the exceptions behind them.

0: done. EXIT_USER: a mistake of the user's, told in one line. EXIT_DATA_LOST, EXIT_PREEMPTED and
EXIT_PEER_LOST: the same command goes on. EXIT_INTERRUPTED: by Ctrl-C. Others are bugs.
"""

import errno

EXIT_USER = 2
EXIT_DATA_LOST = 74  # EX_IOERR of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_PEER_LOST = 76
EXIT_INTERRUPTED = 130
READER = "reader of batches"  # a thread whose end is not waited for: its data may never come


class UserError(Exception):
    """Something the user can mend: entry points print it as one line and exit with code 2."""


def says_unwritable(error: BaseException) -> bool:
    """Whether the system could not write a file: a full disk, a quota, a read-only file system."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error, OSError) and error.errno in codes


def says_no_name(error: BaseException) -> bool:
    """Whether what was taken for the name of a file can't be one."""
    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


class Preempted(Exception):
    """The run was told to stop, and is saved; all of its processes stop at the same step."""


class DataLost(Exception):
    """No more data came: a data worker died, or is stuck. The same command may well go on."""
