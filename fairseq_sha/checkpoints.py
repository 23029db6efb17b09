"""Damaged and foreign checkpoints: never taken for good ones, named when they cannot be read."""

import logging
import os
import zipfile
from itertools import zip_longest
from pathlib import Path

import torch
from fairseq.file_io import PathManager
from torch import distributed

from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.errors import UserError
from fairseq_sha.files import UNFINISHED, copy_atomically

logger = logging.getLogger(__name__)

ZIP_MAGIC = b"PK\x03\x04"


def is_damaged(file):
    """Whether an open binary file begins as torch's zip files do, and its contents are incomplete
    or differ from their checksums. torch itself does not compare them."""
    file.seek(0)
    damaged = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC and not _has_true_checksums(file)
    file.seek(0)
    return damaged


def _has_true_checksums(file):
    try:
        with zipfile.ZipFile(file) as content:
            return content.testzip() is None
    except Exception:  # of any type, depending on where the file stops making sense
        return False


def is_whole(path):
    """Whether a local file is a checkpoint that torch can load. torch's older file format has no
    checksums, so such a file is loaded to find out."""
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            return not is_damaged(file)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # as above
        return False
    return True


def load_checkpoint(path, load):
    """Load a checkpoint by fairseq's function, without running code that it may hold.

    Args:
        path (str): the checkpoint
        load (callable): fairseq's function, all arguments given

    Raises:
        OSError: the file cannot be opened
        UserError: it is damaged, or no checkpoint of fairseq's
    """
    try:
        with PathManager.open(path, "rb") as file:
            if is_damaged(file):
                raise ValueError("contents differ from their checksums")
            if not _torch_loads_safely_by_default():
                torch.load(file, map_location="cpu", weights_only=True)
        state = load()
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


def _torch_loads_safely_by_default():
    """fairseq leaves it to torch, which is safe since 2.6, unless the environment forbids it."""
    return torch_is_at_least(2, 6) and not os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


def checkpoint_to_start_from(cfg):
    """The path of the checkpoint that fairseq will load before training, or None.

    Args:
        cfg: has ``save_dir``, ``restore_file``, ``continue_once``, ``finetune_from_model`` and the
            ``reset_...`` options, as fairseq's checkpoint options

    Raises:
        UserError: it was named and does not exist, so that fairseq would begin from nothing and
            write over what is in ``save_dir``; or options contradict each other
    """
    last = os.path.join(cfg.save_dir, "checkpoint_last.pt")
    if cfg.finetune_from_model is not None:
        _check_finetuning(cfg)
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


def _check_finetuning(cfg):
    """fairseq's own checks, which come after the data was read."""
    parts = ("optimizer", "lr_scheduler", "meters", "dataloader")
    for option in (f"reset_{part}" for part in parts):
        if getattr(cfg, option):
            raise UserError(
                f"--{option.replace('_', '-')}: cannot be combined with --finetune-from-model, "
                "which resets all but the weights; leave it out"
            )
    if cfg.restore_file != "checkpoint_last.pt":
        raise UserError(
            f"--restore-file {cfg.restore_file}: cannot be combined with --finetune-from-model; "
            "leave one of them out"
        )


def replace_damaged_last_checkpoint(folder):
    """Put the newest whole checkpoint of a run in the place of a damaged ``checkpoint_last.pt``.
    Copies that a killed run has not finished are removed.

    Raises:
        UserError: there is no whole one
    """
    several = distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        _replace_damaged_last_checkpoint(Path(folder))
    if several:
        distributed.barrier()


def _replace_damaged_last_checkpoint(folder):
    for path in folder.glob(f".checkpoint*{UNFINISHED}"):  # what a killed run has left
        path.unlink()
    last = folder / "checkpoint_last.pt"
    if not last.is_file() or is_whole(last):
        return
    others = [path for path in folder.glob("checkpoint*.pt") if path != last]
    for other in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if is_whole(other):
            logger.warning("%s is damaged; going on from %s", last, other)
            copy_atomically(other, last)
            return
    raise UserError(f"{last}: damaged, with no whole checkpoint beside it; remove it to begin anew")


def check_codec(saved, codec):
    """Compare what token ids meant where a checkpoint was trained with what they mean now.

    Args:
        saved (dict): has ``symbols``, the list of all symbols, and ``codec``, the codec's name,
            unless the checkpoint is older than these
        codec (~fairseq_sha.data.codecs.Codec): the one in use

    Raises:
        UserError: they differ
    """
    trained, own = saved.get("symbols"), codec.dictionary.symbols
    if trained is None:
        return
    name = saved.get("codec") or "bytes"
    if name != codec.name:
        raise UserError(f"the checkpoint was trained with --codec {name}, not {codec.name}")
    if trained == own:
        return
    pairs = enumerate(zip_longest(trained, own))
    i, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"the checkpoint was trained with another dictionary, in which token {i} was {before!r}, "
        f"not {now!r}; name the data folder that it was trained with"
    )
