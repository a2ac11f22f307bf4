"""The exception for invalid user input."""


class UsageError(ValueError):
    """Invalid input. The message has one line: what was given, what is accepted, what to do.

    The command line prints only this message, without a traceback, and exits with code 1.
    """
