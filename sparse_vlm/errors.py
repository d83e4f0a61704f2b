"""The one error that a person sees as a line instead of a traceback."""


class UserError(ValueError):
    """Something is wrong with what the user gave us. The message is one line: what, where, and what to do.

    The command line prints it and exits with code 2.
    """
