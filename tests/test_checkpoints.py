"""Damaged and foreign checkpoints."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_sha import UserError, compatibility
from fairseq_sha.checkpoints import is_whole, replace_damaged_last_checkpoint

compatibility.apply()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints whose order of age is not that of their names."""
    for age, name in enumerate(["checkpoint_last", "checkpoint_1_9", "checkpoint_best"]):
        torch.save({"model": {"name": name, "weights": torch.rand(9999)}}, tmp_path / f"{name}.pt")
        os.utime(tmp_path / f"{name}.pt", (1000 - age, 1000 - age))
    return tmp_path


def name_in(path):
    return torch.load(path, weights_only=True)["model"]["name"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def change_one_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_the_end(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))


@pytest.mark.parametrize("damage", [truncate, change_one_byte, zero_the_end])
def test_damaged_last_checkpoint_gives_way_to_the_newest_whole_one(folder, caplog, damage):
    last = folder / "checkpoint_last.pt"
    replace_damaged_last_checkpoint(folder)
    assert name_in(last) == "checkpoint_last" and not caplog.text
    damage(last)
    assert not is_whole(last)
    replace_damaged_last_checkpoint(folder)
    assert name_in(last) == "checkpoint_1_9"
    assert f"{last} is damaged; going on from {folder / 'checkpoint_1_9.pt'}" in caplog.text
    damage(last)
    damage(folder / "checkpoint_1_9.pt")
    replace_damaged_last_checkpoint(folder)
    assert name_in(last) == "checkpoint_best"
    damage(last)
    damage(folder / "checkpoint_best.pt")
    with pytest.raises(UserError, match="remove it to begin anew"):
        replace_damaged_last_checkpoint(folder)
    last.unlink()
    replace_damaged_last_checkpoint(folder)


def test_interrupted_copy_leaves_the_old_file(folder, monkeypatch):
    source, last = folder / "checkpoint_1_9.pt", folder / "checkpoint_last.pt"

    def interrupted(source, destination):
        Path(destination).write_bytes(Path(source).read_bytes()[:99])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(source), str(last), overwrite=True)
    assert name_in(last) == "checkpoint_last"
    assert not list(folder.glob("*.unfinished"))
    assert PathManager.copy(str(source), str(last), overwrite=True)
    assert name_in(last) == "checkpoint_1_9"


def test_file_in_torchs_older_format_is_whole_unless_it_was_cut(folder, caplog):
    """The format has no checksums; a file was cut if it cannot be loaded."""
    last = folder / "checkpoint_last.pt"
    state = {"model": {"name": "older", "weights": torch.rand(9999)}}
    torch.save(state, last, _use_new_zipfile_serialization=False)
    assert is_whole(last)
    replace_damaged_last_checkpoint(folder)
    assert name_in(last) == "older" and not caplog.text
    truncate(last)
    assert not is_whole(last)
    with pytest.raises(UserError, match="not a checkpoint that fairseq wrote, or a damaged one"):
        checkpoint_utils.load_checkpoint_to_cpu(str(last))
    replace_damaged_last_checkpoint(folder)
    assert name_in(last) == "checkpoint_1_9"


@pytest.mark.parametrize("content", [b"", b"text", {"weights": 1}, [1, 2], 5])
def test_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "foreign.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"foreign\.pt: (not a checkpoint|holds no model)"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_missing_file_is_reported_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "missing.pt"))
