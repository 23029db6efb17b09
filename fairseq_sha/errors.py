"""Errors that are the user's to mend, shown as one line instead of a traceback."""

import sys


class UserError(ValueError):
    """Bad input. The message is one line that names the input and the remedy."""


def show_user_errors_in_one_line():
    """Make the interpreter print an uncaught :class:`UserError` as ``error: message``.

    fairseq's commands let exceptions reach the interpreter, so this is the one place where the
    traceback, which would bury the message, can be left out. Everything else is reported as before.
    (In fairseq-hydra-train Hydra reports errors itself, the message last.)
    """
    report = sys.excepthook

    def report_briefly(kind, error, traceback):
        if issubclass(kind, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            report(kind, error, traceback)

    sys.excepthook = report_briefly
