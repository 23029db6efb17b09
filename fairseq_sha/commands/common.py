"""What the commands that use a trained model have in common."""

import argparse
import logging
import os

from fairseq_sha.errors import UserError


def model_parser(command, description):
    """A parser of a command's arguments that has the options that name the model."""
    parser = argparse.ArgumentParser(
        prog=f"python -m fairseq_sha.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="the trained model")
    parser.add_argument(
        "--data-bin",
        metavar="DIR",
        help="data folder that it was trained with, if the checkpoint does not hold its symbols",
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    return parser


def add_model_arguments(parser):
    """Declare the options that name the model."""
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="the trained model")
    parser.add_argument(
        "--data-bin",
        metavar="DIR",
        help="data folder that it was trained with, if the checkpoint does not hold its symbols",
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")


def load_model(args):
    """The model that the options of :func:`add_model_arguments` name."""
    import logging

    logging.getLogger().setLevel(logging.WARNING)
    from fairseq_sha.trained_model import TrainedModel

    return TrainedModel.load(args.path, args.data_bin, args.cpu)


def load(args):
    """The model that the options of :func:`model_parser` name."""
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq makes all packages talkative
    from fairseq_sha.trained_model import TrainedModel

    return TrainedModel.load(args.path, args.data_bin, args.cpu)


def check_new(paths):
    """Refuse to write over files, or where nothing can be written."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; move it away")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: its folder is missing or cannot be written to")


def write(path, content):
    """Write a file at once: under another name until it is whole.

    Args:
        path (Path): what to write
        content (bytes or str)
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if unfinished.exists():
            unfinished.unlink()
