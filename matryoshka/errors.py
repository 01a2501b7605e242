"""The one exception for invalid input and whatever else a user can fix."""


class UserError(ValueError):
    """Something the user asked for cannot be done as asked.

    The message is one paragraph: what was found, what was expected, what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary `ValueError`.
    """
