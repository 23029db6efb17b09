"""What tests of all folders share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

import fairseq_sha  # noqa: F401  registers the plug-in

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)
    np.random.seed(1)


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
