"""Damaged and foreign checkpoints: never taken for good ones, named when they cannot be read."""

import functools
import logging
import os
import shutil
import zipfile
from argparse import Namespace
from itertools import zip_longest
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from torch import distributed

from fairseq_sha.errors import UserError

logger = logging.getLogger(__name__)


def is_whole(file):
    """Whether a file, open or a path, is a zip, as torch writes it, whose contents have their
    checksums."""
    try:
        with zipfile.ZipFile(file) as content:
            return content.testzip() is None
    except Exception:  # of any type, depending on where the file stops making sense
        return False


def is_damaged(file):
    """Whether a binary file begins as torch's do and is not whole. torch does not look."""
    file.seek(0)
    begins_as_zip = file.read(4) == b"PK\x03\x04"
    damaged = begins_as_zip and not is_whole(file)
    file.seek(0)
    return damaged


def checkpoint_to_start_from(cfg):
    """The path of the checkpoint that fairseq will load before training, or None.

    Args:
        cfg: has ``save_dir``, ``restore_file``, ``continue_once`` and ``finetune_from_model``, as
            fairseq's options

    Raises:
        UserError: it was named and does not exist; fairseq would begin from nothing, and write over
            what is in ``save_dir``
    """
    last = os.path.join(cfg.save_dir, "checkpoint_last.pt")
    if cfg.restore_file != "checkpoint_last.pt":
        option, path = "--restore-file", cfg.restore_file
    elif PathManager.isfile(last):
        return last
    elif cfg.continue_once:
        option, path = "--continue-once", cfg.continue_once
    else:
        option, path = "--finetune-from-model", cfg.finetune_from_model
    if path is not None and not PathManager.isfile(path):
        beside = os.path.join(cfg.save_dir, path)
        remedy = f"name {beside}" if PathManager.isfile(beside) else "name a checkpoint"
        raise UserError(f"{option} {path}: no such file; {remedy}")
    return path


def replace_damaged_last_checkpoint(folder):
    """Put the newest whole checkpoint of a run in the place of a damaged ``checkpoint_last.pt``.

    Raises:
        UserError: there is no whole one
    """
    several = distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        _replace_damaged_last_checkpoint(Path(folder))
    if several:
        distributed.barrier()


def _replace_damaged_last_checkpoint(folder):
    last = folder / "checkpoint_last.pt"
    if not last.is_file() or is_whole(last):
        return
    others = [path for path in folder.glob("checkpoint*.pt") if path != last]
    for other in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if is_whole(other):
            logger.warning("%s is damaged; going on from %s", last, other)
            copy_at_once(other, last)
            return
    raise UserError(f"{last}: damaged, with no whole checkpoint beside it; remove it to begin anew")


def copy_at_once(source, destination):
    """Copy a file so that the destination is the old one or the whole new one at any time."""
    unfinished = f"{destination}.unfinished"
    shutil.copyfile(source, unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, destination)


def keep_last_checkpoint_whole():
    """Make fairseq replace ``checkpoint_last.pt`` and ``checkpoint_best.pt`` at once. It copies the
    new one over the old one, so that a run that is killed meanwhile would leave half of it."""
    copy = PathManager.copy

    @functools.wraps(copy)
    def copy_local_files_at_once(src_path, dst_path, overwrite=False):
        if "://" in str(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        copy_at_once(src_path, dst_path)
        return dst_path

    PathManager.copy = staticmethod(copy_local_files_at_once)


def save_settings_as_plain_values():
    """Make fairseq write settings of its older parts, such as its SGD, as a dict. It writes their
    argparse.Namespace, which torch then refuses to load, since loading objects can run code."""
    save = checkpoint_utils.torch_persistent_save

    @functools.wraps(save)
    def save_plain_values(obj, *args, **kwargs):
        cfg = obj.get("cfg") if isinstance(obj, dict) else None
        if isinstance(cfg, dict):
            plain = {k: vars(v) if isinstance(v, Namespace) else v for k, v in cfg.items()}
            obj = {**obj, "cfg": plain}
        return save(obj, *args, **kwargs)

    checkpoint_utils.torch_persistent_save = save_plain_values


def explain_unreadable_checkpoints():
    """Make fairseq say which file it was that it could not read, in one line."""
    load = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load)
    def load_or_explain(path, *args, **kwargs):
        try:
            with PathManager.open(path, "rb") as file:
                damaged = is_damaged(file)
            if damaged:
                raise ValueError("contents lack their checksums")
            state = load(path, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{path}: not a checkpoint that fairseq wrote, or a damaged one "
                f"({type(error).__name__}: {reason}); name another"
            )
        if "model" not in state:
            raise UserError(f"{path}: holds no model; name a checkpoint that fairseq wrote")
        return state

    checkpoint_utils.load_checkpoint_to_cpu = load_or_explain


def check_symbols(trained, own):
    """Compare the dictionary that a checkpoint was trained with (a list of symbols, or None if it
    does not say) with the one in use.

    Raises:
        UserError: they differ
    """
    if trained is None or own is None or trained == own:
        return
    pairs = enumerate(zip_longest(trained, own))
    i, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"the checkpoint was trained with another dictionary, in which token {i} was {before!r}, "
        f"not {now!r}; name the data folder that it was trained with"
    )
