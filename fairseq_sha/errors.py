"""Errors that are the user's to mend, shown as one line instead of a traceback."""

import sys


class UserError(ValueError):
    """Bad input. The message is one line that names the input and the remedy."""


def show_user_errors_in_one_line():
    """Make the interpreter print an uncaught :class:`UserError` as ``error: message``.

    fairseq's commands let exceptions reach the interpreter, so this is the one place where the
    traceback, which would bury the message, can be left out. Files that cannot be opened, read or
    written are reported in the same way; everything else as before.
    (In fairseq-hydra-train Hydra reports errors itself, the message last.)
    """
    report = sys.excepthook

    def report_briefly(kind, error, traceback):
        message = users_error_behind(error)
        if message is None:
            report(kind, error, traceback)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = report_briefly


def users_error_behind(error):
    """What the user must know of an error, or None: itself, if it is of a file, or the UserError
    that fairseq replaced by it."""
    of_files = (
        FileExistsError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    )
    # OSError itself is a full disk, or fairseq's own word for a missing file.
    if isinstance(error, of_files) or type(error) is OSError:
        return error
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
