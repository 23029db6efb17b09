"""``fairseq-sha COMMAND``, also ``python -m fairseq_sha COMMAND``: what users type.

Each command is a module of this folder with a docstring, which is its help, and two functions:
``add_arguments(parser)`` and ``run(args)``, which may return an exit status. Importing the module
must be fast, so that ``--help`` answers at once: torch and fairseq are imported by ``run``.
"""

import argparse
import errno
import importlib
import os
import sys

from fairseq_sha import signals
from fairseq_sha.errors import UserError, wants_traceback

#: The module of each command, and a line of help.
COMMANDS = {
    "generate": "continue a prompt",
    "score": "the cost of each token of a text",
    "evaluate": "the score of a split of a data folder",
    "lm-eval": "evaluate with EleutherAI's lm-evaluation-harness",
    "tune-dynamic": "a learning rate for dynamic evaluation",
    "compress": "pack files",
    "decompress": "unpack them",
    "quantize": "write a model in integers, the same on every machine",
    "export": "write a model as ONNX",
    "import-weights": "make a checkpoint from published weights",
    "published": "published results, with parameters, recipes and commands",
    "flops": "count the floating-point operations of a model",
    "compare": "train and evaluate models under one budget",
    "report": "a page about comparisons",
    "rivals": "what classical compressors make of a data folder",
}
#: Errors of a write: no space, no quota, a file that is too large, hardware.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv=None):
    """Run a command; returns the exit status. An error that the user can fix is one line."""
    if hasattr(sys.stdout, "reconfigure"):
        # A name or a text that the terminal cannot show must not end the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv is None:
        signals.end_by_exception()
    try:
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            return args.run(args) or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        _discard_output()
        return 128 + 13  # as a shell reports SIGPIPE
    except (UserError, OSError) as error:
        message = _message(error)
        if message is None or wants_traceback():
            raise
        print(f"error: {message}", file=sys.stderr)
        if getattr(error, "errno", None) in FULL:
            _discard_output()
        return 1


def _message(error):
    """The line to show for an error that the user can fix; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return error.strerror if error.errno in FULL else None


def _discard_output():
    """Python flushes standard output once more at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Wrong usage is an error as any other: 1, not 2, which is the exit status of a warning."""

    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def parse(argv):
    """The options of the command that is named first; only its module is imported."""
    parser = _Parser(
        prog="fairseq-sha", description="Use and compare language models that fairseq has trained."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        command = commands.add_parser(
            name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == named:
            module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(argv)
