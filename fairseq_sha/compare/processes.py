"""Runs commands, several at once, and stops all of them together."""

import fcntl
import math
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

from fairseq_sha.compare import logs

PROGRESS_SECONDS = 15
LOG_TAIL = 12  # lines


class RunFailed(Exception):
    """A command failed; the message says which, and shows the end of its log."""


class Processes:
    """Commands that run side by side.

    Args:
        parallel (int): how many at once
        threads (int): of each command (``OMP_NUM_THREADS``); None to leave that as it is
    """

    def __init__(self, parallel=1, threads=None):
        self.parallel = parallel
        self.environment = {**os.environ}
        if threads is not None:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.stopping = threading.Event()

    def run(self, jobs):
        """Call functions without arguments, ``parallel`` at once, in order. An interruption stops
        all commands; an exception of a job is raised when the others have ended."""
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._unless_stopping, job) for job in jobs]
            try:
                wait(futures)
            except KeyboardInterrupt:
                self.stopping.set()
                raise
        for future in futures:
            future.result()

    def _unless_stopping(self, job):
        if not self.stopping.is_set():
            job()

    def execute(self, command, log, title, status, is_done, again=False):
        """Run a command, append its output to a log, and print its progress from time to time.
        While another command writes the log, such as one whose parent was killed, wait for it; if
        it did the work, that is all.

        Args:
            command (list of str): the command
            log (Path): of the output
            title (str): what is run
            status (callable): returns the progress as text
            is_done (callable): tells from the log's text whether the command did its work
            again (bool): empty the log first, and run the command even if its work is done

        Raises:
            RunFailed: it did not, or exited with an error
            KeyboardInterrupt: the command was stopped with all others
        """
        print(f"{title}: {status()}", flush=True)
        with open(log, "ab") as out:
            # The command inherits this lock with its output.
            self._lock(out, lambda: f"{title}: {status()}, by an earlier command that still runs")
            if again:
                out.truncate(0)
            elif is_done(logs.read(log)):
                return
            started = printed = time.monotonic()
            # In a session of its own, so that all of its processes can be stopped together.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,
            )
            stopped = False
            while True:
                try:
                    pid, code, usage = os.wait4(child.pid, 0 if stopped else os.WNOHANG)
                    if pid:
                        break
                    time.sleep(0.1)
                    if time.monotonic() - printed >= PROGRESS_SECONDS:
                        printed = time.monotonic()
                        print(f"{title}: {status()}, {printed - started:.0f} s", flush=True)
                except KeyboardInterrupt:
                    self.stopping.set()
                if self.stopping.is_set() and not stopped:
                    stopped = True
                    os.killpg(child.pid, signal.SIGTERM)
            child.returncode = os.WEXITSTATUS(code) if os.WIFEXITED(code) else -os.WTERMSIG(code)
            # ru_maxrss is in KB. On Linux it is at least that of this process, which is small: it
            # does not import torch.
            peak = usage.ru_maxrss // 1024
            out.write(f"{logs.ENDED} {child.returncode}, peak memory {peak} MB\n".encode())
        if stopped:
            raise KeyboardInterrupt
        if child.returncode != 0 or not is_done(logs.read(log)):
            lines = logs.read(log).splitlines()[-LOG_TAIL:]
            tail = "\n".join("    " + line[:200] for line in lines)
            raise RunFailed(f"failed; the end of {log}:\n{tail}")

    def _lock(self, out, status):
        """Lock an open file; wait for others, and print their progress."""
        printed = -math.inf
        while True:
            try:
                return fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - printed >= PROGRESS_SECONDS:
                    printed = time.monotonic()
                    print(status(), flush=True)
                if self.stopping.wait(0.2):
                    raise KeyboardInterrupt
