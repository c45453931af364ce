"""How a run ends: exit codes and the exceptions behind them.

0 means that the run is done. EXIT_USER is a user error, reported in one line. After EXIT_DATA_LOST,
EXIT_PREEMPTED or EXIT_PEER_LOST, rerunning the same command resumes the run. EXIT_PEER_LOST also
means that the run hung. EXIT_INTERRUPTED is Ctrl-C. Any other exit code is a bug.
"""

import errno

EXIT_USER = 2
EXIT_DATA_LOST = 74  # EX_IOERR of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_PEER_LOST = 76
EXIT_INTERRUPTED = 130
READER = "reader of batches"  # thread that is not joined on exit, as its data may never come


class UserError(Exception):
    """An error that the user can fix. Entry points print it as one line and exit with code 2."""


def says_unwritable(error: BaseException) -> bool:
    """Whether a file could not be written: full disk, exceeded quota or read-only file system."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error, OSError) and error.errno in codes


def says_no_name(error: BaseException) -> bool:
    """Whether a string used as a file name is not a valid one."""
    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


class Preempted(Exception):
    """The run was asked to stop and has been saved. All its processes stop at the same step."""


class DataLost(Exception):
    """No more data arrived: a data worker died or is stuck. Rerunning may well succeed."""
