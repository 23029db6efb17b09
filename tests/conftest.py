"""What tests of all folders share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

import fairseq_sha
from tests.commands import command
from tests.options import FAMILIES
from tests.tiny_corpus import write_folder

fairseq_sha.register()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)
    np.random.seed(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The checkpoint of each family, trained for a moment; its data folder is gone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = write_folder(tmp_path_factory.mktemp("data"))
    paths = {}
    for family, options in FAMILIES.items():
        save = folder / family
        done = command("fairseq-train", data, f"{options} --max-update 12 --save-dir {save}")
        assert done.returncode == 0, done.stdout
        paths[family] = save / "checkpoint_last.pt"
    for path in Path(data).iterdir():
        path.unlink()
    return paths


def golden_cases(name):
    """The cases of ``golden/NAME.npz``: a dict by case of dicts by key."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        cases = {}
        for key in file.files:
            case, _, rest = key.partition("/")
            cases.setdefault(case, {})[rest] = torch.from_numpy(file[key])
    return cases


def dictionary_of(size):
    """A dictionary of ``size`` symbols, the four special ones included."""
    dictionary = Dictionary()
    for i in range(size - len(dictionary)):
        dictionary.add_symbol(str(i))
    return dictionary
