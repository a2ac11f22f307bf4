"""The one exception whose message is written for the user: what was given, what is accepted, what to do."""


class Refused(ValueError):
    """Bad input, found where its cause is known. The command line prints the message as one line and exits with 1."""
