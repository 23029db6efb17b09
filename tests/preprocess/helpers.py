"""Run the scripts as a user does, and check what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sha.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PREPROCESS = REPOSITORY / "preprocess"
sys.path.insert(0, str(PREPROCESS))  # as Python does for a script in that folder


class Runner:
    """Runs scripts in a folder of its own, where --dest and --input are looked for."""

    def __init__(self, folder):
        self.folder = folder

    def script(self, name, *args, **options):
        """Run preprocess/NAME.py; returns the completed process."""
        return self.python(str(PREPROCESS / f"{name}.py"), *args, **options)

    def code(self, code, *args, **options):
        """Run Python code that can import the scripts in preprocess/."""
        code = f"import sys; sys.path.insert(0, {str(PREPROCESS)!r})\n" + code
        return self.python("-c", code, *args, **options)

    def python(self, *args, **options):
        command = [sys.executable, *map(str, args)]
        options["env"] = {**os.environ, **options.get("env", {})}
        options["env"]["PYTHONPATH"] = str(REPOSITORY)  # as if this copy were installed
        return subprocess.run(
            command, cwd=str(self.folder), capture_output=True, text=True, timeout=60, **options
        )

    def write(self, data, name="input"):
        (self.folder / name).write_bytes(data)
        return name

    def check_error(self, done, *words, files=("input",)):
        """Status 1, one line on stderr with these words, and nothing but ``files`` left."""
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith("\n")
        self._check_line(done.stderr[:-1], words, files)

    def check_user_error(self, main, argv, *words, files=("input",)):
        """The same in this process, which is quicker. ``check_error`` also checks that
        ``data_bin.run`` turns a UserError into status 1 and a line on stderr."""
        with pytest.raises(UserError) as caught:
            main([str(arg) for arg in argv])
        self._check_line(str(caught.value), words, files)

    def _check_line(self, line, words, files):
        assert "\n" not in line
        assert not [word for word in words if word not in line], line
        assert sorted(os.listdir(str(self.folder))) == sorted(files)


def read_back(folder):
    """The items of each split as fairseq reads them, turned back into bytes."""
    from fairseq.data import Dictionary, MMapIndexedDataset

    dictionary = Dictionary.load(str(folder / "dict.txt"))
    assert len(dictionary) % 8 == 0

    byte_of = {dictionary.index(str(byte)): byte for byte in range(256)}
    byte_of[dictionary.eos()] = 10
    byte_of.pop(dictionary.unk(), None)

    splits = []
    for name in ("train", "valid", "test"):
        dataset = MMapIndexedDataset(str(folder / name))
        splits.append(
            [bytes(map(byte_of.__getitem__, dataset[i].tolist())) for i in range(len(dataset))]
        )
    return splits


def split_lines(data):
    """Lines that keep their newline byte, and end at no other byte."""
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
