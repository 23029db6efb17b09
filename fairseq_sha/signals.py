"""Signals that ask a program to end raise an exception, so that unfinished files are removed.

Standard library only: the commands' ``--help`` must not wait for fairseq.
"""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler):
    """Have these signals call a handler, but for those that are ignored: nohup relies on that."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_by_exception():
    """Have these signals raise SystemExit with the status 128 + signal, as in a shell, and say so
    in one line."""
    handle(_stop)


def _stop(number, _frame):
    for each in SIGNALS:  # a second one must not interrupt the clean-up
        signal.signal(each, signal.SIG_IGN)
    # print would fail if the signal arrived while something was being printed.
    os.write(2, f"error: stopped by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)
