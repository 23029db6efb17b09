"""Errors that the user can fix, shown as one line instead of a traceback.

Standard library only: the commands' ``--help`` must not wait for fairseq.
"""

import os
import re
import sys


class UserError(ValueError):
    """Bad input. The message is one line that names the input and the remedy."""


#: Set this environment variable to 1 to see the full traceback of every error.
TRACEBACK_VARIABLE = "FAIRSEQ_SHA_TRACEBACK"


def wants_traceback():
    """Whether the user asked for full tracebacks."""
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def user_message(error):
    """The line to show for an uncaught exception, or None if it is not a :class:`UserError`.

    fairseq replaces some exceptions by its own while it handles them, so the chain of causes is
    searched. torch reports an exception of a worker process as text.
    """
    seen = []
    while error is not None and not any(error is other for other in seen):
        if isinstance(error, UserError):
            return str(error)
        if type(error).__name__ == "ProcessRaisedException":
            return _user_message_of_worker(str(error))
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _user_message_of_worker(traceback):
    messages = re.findall(
        rf"^{re.escape(UserError.__module__)}\.UserError: (.*)$", traceback, re.MULTILINE
    )
    return messages[-1] if messages else None


def show_user_errors_in_one_line():
    """Make the interpreter print an uncaught :class:`UserError` as ``error: message``.

    fairseq's commands let exceptions reach the interpreter, so ``sys.excepthook`` is the only
    place where the traceback can be left out. All other exceptions are reported as before.
    """
    report = sys.excepthook

    def report_briefly(kind, error, traceback):
        message = user_message(error)
        if message is None or wants_traceback():
            report(kind, error, traceback)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = report_briefly
