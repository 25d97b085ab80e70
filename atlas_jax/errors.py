"""UserError, the one error whose message is written for the user."""


class UserError(Exception):
    """Bad input: the message is one line naming the file, the line and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
