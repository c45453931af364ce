"""The one exception that is a user's mistake rather than a bug."""


class UserError(Exception):
    """Something the user can mend: entry points print it as one line and exit with code 2."""
