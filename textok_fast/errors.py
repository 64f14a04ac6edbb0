"""The one exception a caller's mistake raises."""


class InputError(ValueError):
    """Something the caller gave cannot be used: the message says what came, what was wanted and what to do.

    The command line prints the message as one line and exits with status 2; everything else is a bug and keeps its traceback.
    """
