"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """Bad input, said in one line: what is wrong and what to do about it.

    The command line prints the message and exits with 2; Python callers catch it as a ``ValueError``.
    """
