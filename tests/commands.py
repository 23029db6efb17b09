"""Runs what users type, in processes of their own.

They are forked from a server that has fairseq imported, which saves seconds each; the plug-in is
imported through ``--user-dir``, as always.
"""

import importlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parent.parent
MODULES = {
    "fairseq-train": "train",
    "fairseq-validate": "validate",
    "fairseq-eval-lm": "eval_lm",
    "fairseq-generate": "generate",
    "fairseq-hydra-train": "hydra_train",
}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([f"fairseq_cli.{module}" for module in MODULES.values()])


class Done(NamedTuple):
    returncode: int
    stdout: str


class Running:
    """A command that was started."""

    def __init__(self, argv):
        handle, log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log = Path(log)
        self.process = _server.Process(target=_run, args=([str(word) for word in argv], log))
        self.process.start()

    def output(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)

    def wait(self, seconds=None):
        """What it printed, and its exit status; a killed one has a negative status."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"not done in {seconds} s:\n{self.output()}"
        done = Done(self.process.exitcode, self.output())
        self.log.unlink()
        return done

    def wait_for(self, condition, seconds=60):
        """Poll until a condition holds or the command has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.exitcode is None:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.0005)


def _run(argv, log):
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(REPOSITORY))
    sys.argv = argv
    import torch

    torch.set_num_threads(1)
    status = 0
    try:
        importlib.import_module(f"fairseq_cli.{MODULES[argv[0]]}").cli_main()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        # multiprocessing would print a traceback instead of what the interpreter prints.
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.exit(status)


def start(name, data, options, task="byte_language_modeling"):
    argv = [name, data, "--user-dir", "fairseq_sha", "--task", task]
    return Running([*argv, *options.split()])


def command(name, data, options, **kwargs):
    """Run one of fairseq's commands to its end."""
    return start(name, data, options, **kwargs).wait()


def hydra_train(folder, name, *overrides):
    """Run ``folder/name.yaml``."""
    argv = ["fairseq-hydra-train", "--config-dir", folder, "--config-name", name, *overrides]
    return Running(argv).wait()


def logged_losses(output):
    """What fairseq logged about each update, without times."""
    lines = re.findall(r"train_inner.*?(loss=\S+).*?(num_updates=\d+).*?(gnorm=\S+)", output)
    return {updates: (loss, gnorm) for loss, updates, gnorm in lines}
