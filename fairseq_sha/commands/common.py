"""What the commands that use a trained model share."""

import ast
import contextlib
import io
import logging
import os
import sys
from pathlib import Path

import fairseq_sha
from fairseq_sha.errors import UserError

#: What stands for standard input, or output.
STANDARD = Path("-")


def add_model_arguments(parser, required=True, what="CHECKPOINT"):
    """Declare the options that name a model."""
    parser.add_argument("--path", required=required, metavar=what, help="the trained model")
    parser.add_argument(
        "--data-bin",
        metavar="DIR",
        help="data folder that it was trained with, if the checkpoint does not hold its symbols",
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument(
        "--user-dir", metavar="DIR", help="plug-in of your own that registers the model"
    )
    parser.add_argument(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="settings of the model to change, as in fairseq: \"{'mem_len': 100}\"",
    )


def load_model(args, allow_stock=False, allow_diverged=False):
    """The :class:`~fairseq_sha.trained_model.TrainedModel` that :func:`add_model_arguments` names.

    Args:
        args: the command's options
        allow_stock (bool): accept fairseq's own models too
        allow_diverged (bool): accept weights that are not finite, whose score is nan

    Raises:
        UserError: there is no such model, or an option is wrong
    """
    from fairseq_sha.trained_model import TrainedModel

    logging.getLogger().setLevel(logging.WARNING)  # fairseq has every package log everything
    import_plugin(args)
    overrides = model_overrides(args.model_overrides)
    collapse = not getattr(args, "dynamic", None)
    trained = TrainedModel.load(
        args.path, args.data_bin, args.cpu, overrides, allow_stock, collapse
    )
    if not allow_diverged:
        check_finite(args.path, trained.models[0])
    return trained


def check_finite(path, model):
    """Raise a UserError if the weights of a checkpoint's model are not finite."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite, so training has diverged; name an earlier "
                "checkpoint"
            )


def use_symbols_of_data(args):
    """Take the symbols of a checkpoint that does not hold them from the data that are read.

    Raises:
        UserError: ``--data-bin`` names another folder
    """
    if args.data_bin and os.path.realpath(args.data_bin) != os.path.realpath(args.data):
        raise UserError(
            f"--data-bin {args.data_bin}: the symbols are those of {args.data}, which is read; "
            "remove it"
        )
    args.data_bin = args.data


def load_coder(args, threads=1):
    """The :class:`~fairseq_sha.packed_file.BlockCoder` of the model that
    :func:`add_model_arguments` names. A portable model needs neither torch nor fairseq.

    Args:
        args: the command's options
        threads (int): of torch, for packing with a checkpoint

    Raises:
        UserError: there is no such model, or an option is wrong
    """
    model = load_portable(args)
    if model is not None:
        return model
    from fairseq_sha import compression

    compression.check_packages()
    return compression.ModelCoder(load_model(args), threads)


def load_portable(args):
    """The :class:`~fairseq_sha.portable.PortableModel` that :func:`add_model_arguments` names; None
    if the file is something else, such as a checkpoint.

    Raises:
        UserError: it is damaged, or an option is not for it
    """
    from fairseq_sha import portable

    if not portable.is_portable_file(args.path):
        return None
    for option in ("data_bin", "user_dir", "model_overrides"):
        if getattr(args, option) not in (None, "{}"):
            name = option.replace("_", "-")
            raise UserError(f"--{name}: a portable model holds all of its settings; remove it")
    return portable.load(args.path)


def import_plugin(args):
    """Import the plug-in that ``args.user_dir`` names, unless it is this package.

    Raises:
        UserError: there is no such folder, or its name is taken
    """
    from fairseq import utils

    if not args.user_dir:
        return
    if not os.path.isdir(args.user_dir):
        raise UserError(f"--user-dir {args.user_dir}: no such folder")
    if not os.path.samefile(args.user_dir, os.path.dirname(fairseq_sha.__file__)):
        folder = os.path.abspath(args.user_dir)
        loaded = sys.modules.get(os.path.basename(folder))
        if loaded is not None and folder not in getattr(loaded, "__path__", ()):
            raise UserError(f"--user-dir {args.user_dir}: another module has this name; rename it")
        utils.import_user_module(args)


def model_overrides(text):
    """The dict that ``--model-overrides`` gives."""
    try:
        overrides = ast.literal_eval(text)
        if isinstance(overrides, dict) and all(isinstance(key, str) for key in overrides):
            return overrides
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    raise UserError(
        f"--model-overrides {text}: not a dict of settings; give one such as \"{{'mem_len': 100}}\""
    )


def read_config(path):
    """The sections of a YAML file: a dict."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"{path}: no such config; give the path of a YAML file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(str(path)), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a config: {' '.join(str(error).split())}; correct it")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a config: it has no sections; correct it")
    return content


def check_new(paths):
    """Refuse to write over files, or where nothing can be written."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; move it away")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: its folder is missing or cannot be written to")


def path_or_standard(text):
    """A Path, or :data:`STANDARD` for ``-``, as a type of argparse's options."""
    # For Path, the file "./-" is "-" too.
    return Path(text) if text == "-" or Path(text) != STANDARD else Path(os.path.abspath(text))


def read_text(path):
    """The bytes of a file, or of standard input."""
    return sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()


@contextlib.contextmanager
def standard_output():
    """Yield standard output for bytes. Where Python does not buffer it (``python -u``), a write may
    leave out what a full disk or a pipe does not take, without an error."""
    output = sys.stdout.buffer
    if isinstance(output, io.RawIOBase):
        with open(os.dup(output.fileno()), "wb") as buffered:
            yield buffered
        return
    yield output
    output.flush()


def progress_bar(name, total=None):
    """Shows on standard error how many bytes are done, if it is a terminal.

    Args:
        name (str): what is read
        total (int): its bytes, if they are known
    """
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None)
