"""Errors that are the user's to mend, shown as one line instead of a traceback."""

import re
import sys
import traceback
from pathlib import Path

import fairseq


class UserError(ValueError):
    """Bad input. The message is one line that names the input and the remedy."""


def show_user_errors_in_one_line():
    """Make the interpreter print an uncaught :class:`UserError` as ``error: message``.

    fairseq's commands let exceptions reach the interpreter, so this is the one place where the
    traceback, which would bury the message, can be left out. Files that cannot be opened, read or
    written are reported in the same way, and what fairseq itself finds wrong with its options;
    everything else as before.
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


OF_FILES = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def users_error_behind(error):
    """What the user must know of an error, or None: itself, if it is of a file, the UserError that
    fairseq replaced by it, or what fairseq demands of its options."""
    # OSError itself is a full disk, or fairseq's own word for a missing file.
    if isinstance(error, OF_FILES) or type(error) is OSError:
        return error
    if type(error).__name__ == "ProcessRaisedException":
        return _users_error_of_worker(str(error))
    behind = error
    while behind is not None and not isinstance(behind, UserError):
        behind = behind.__cause__ or behind.__context__
    return behind or _demand_of_fairseq(error)


def _users_error_of_worker(text):
    """The same from the traceback of a process that fairseq started for a GPU, as text."""
    names = ["AssertionError", *(kind.__name__ for kind in OF_FILES)]
    ours = re.findall(rf"^{UserError.__module__}\.UserError: (.*)$", text, re.MULTILINE)
    others = re.findall(rf"^(?:{'|'.join(names)}): (.*)$", text.rstrip().rpartition("\n")[2])
    return (ours or others or [None])[-1]


def _demand_of_fairseq(error):
    """The message of a check that failed in fairseq's own code; the check, if it has none."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (Path(fairseq.__file__).parent, Path(fairseq.__file__).parent.parent / "fairseq_cli")
    if not isinstance(error, (AssertionError, ValueError)) or not frames:
        return None
    if not any(folder in Path(frames[-1].filename).parents for folder in inside):
        return None
    message = (str(error).splitlines() or [""])[0]
    return f"fairseq: {message[:300] or frames[-1].line}"
