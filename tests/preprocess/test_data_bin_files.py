"""The files are byte for byte those that fairseq would write."""

import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, MMapIndexedDataset, data_utils
from fairseq.data.indexed_dataset import make_builder

from fairseq_sha.data import data_bin
from fairseq_sha.errors import UserError

from .helpers import PREPROCESS, REPOSITORY, split_lines


def convert(tmp_path, data, valid, test, all_bytes=False):
    (tmp_path / "input").write_bytes(data)
    with open(str(tmp_path / "input"), "rb") as stream:
        data_bin.convert(stream, "input", tmp_path / "out", valid, test, all_bytes)
    return tmp_path / "out"


def fairseq_dictionary(data, symbols):
    """fairseq's dictionary of the bytes in ``data``, given ``symbols`` that may be in it."""
    counts = Counter(data)
    dictionary = Dictionary()
    for byte in symbols:
        if byte == 10:
            dictionary.add_symbol("</s>", n=counts[byte])
        else:
            dictionary.add_symbol(str(byte), n=counts[byte])
    dictionary.finalize()
    return dictionary


def token(dictionary, byte):
    return dictionary.eos() if byte == 10 else dictionary.index(str(byte))


def random_bytes(seed, alphabet, size):
    """Bytes whose counts are small, so that many are equal."""
    rng = random.Random(seed)
    return bytes(rng.choices(alphabet, k=size))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("all_bytes", [False, True])
def test_files_equal_fairseqs(tmp_path, seed, all_bytes):
    alphabet = random.Random(seed).sample(range(256), 40 * seed + 5) + [10] * (seed % 3)
    train = bytes(alphabet) + random_bytes(seed, alphabet, 500 * seed)
    valid, test = random_bytes(-seed, alphabet, 300), random_bytes(seed + 9, alphabet, 301)
    folder = convert(tmp_path, train + valid + test, 300, 301, all_bytes)

    symbols = range(256) if all_bytes else sorted(set(train), reverse=True)
    dictionary = fairseq_dictionary(train, symbols)
    dictionary.save(str(tmp_path / "dict.txt"))
    assert (folder / "dict.txt").read_bytes() == (tmp_path / "dict.txt").read_bytes()

    for name, part in (("train", train), ("valid", valid), ("test", test)):
        builder = make_builder(str(tmp_path / "its.bin"), "mmap", vocab_size=len(dictionary))
        for line in split_lines(part):
            builder.add_item(torch.tensor([token(dictionary, byte) for byte in line]))
        builder.finalize(str(tmp_path / "its.idx"))
        for ending in ("bin", "idx"):
            ours = (folder / f"{name}.{ending}").read_bytes()
            assert ours == (tmp_path / f"its.{ending}").read_bytes()


def test_fairseq_finds_the_dataset(tmp_path):
    folder = convert(tmp_path, b"ab\n" * 30, 9, 9)
    dataset = data_utils.load_indexed_dataset(str(folder / "train"), dataset_impl=None)
    assert isinstance(dataset, MMapIndexedDataset)
    assert dataset.sizes.tolist() == [3] * 24


def test_same_as_fairseq_preprocess(tmp_path):
    """What fairseq-preprocess makes of the customary text: bytes as numbers, newlines as such."""
    rng = random.Random(1)
    alphabet = rng.sample(range(256), 120) + [10, 10, 10]
    train = bytes(alphabet) * 2 + random_bytes(2, alphabet, 3000) + b"x\n"  # ends with a newline
    train += b"x\n" if 120 not in alphabet else b""
    valid, test = random_bytes(3, alphabet, 700) + b"\n", random_bytes(4, alphabet, 700) + b"x"
    folder = convert(tmp_path, train + valid + test, len(valid), len(test))

    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    command += ["--destdir", str(tmp_path / "its")]
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        text = "".join("\n" if byte == 10 else f"{byte} " for byte in part)
        (tmp_path / name).write_text(text)
        command += [f"--{name}pref", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr

    its_dictionary = (tmp_path / "its" / "dict.txt").read_text()
    assert (folder / "dict.txt").read_text() == its_dictionary
    counts = [line.split()[1] for line in its_dictionary.splitlines()]
    assert len(set(counts)) < len(counts) // 2  # there are enough ties for the order to matter

    for name, part in (("train", train), ("valid", valid), ("test", test)):
        ours, its = (
            MMapIndexedDataset(str(folder / name)),
            MMapIndexedDataset(str(tmp_path / "its" / name)),
        )
        assert len(ours) == len(its)
        tokens = [np.concatenate([d[i].numpy() for i in range(len(d))]) for d in (ours, its)]
        # Only where the last line does not end does fairseq-preprocess end it.
        end = [] if part.endswith(b"\n") else [data_bin.EOS]
        assert np.append(tokens[0], end).tolist() == tokens[1].tolist()


def test_importing_needs_neither_fairseq_nor_torch():
    code = (
        "import sys, bytes, enwik8, enwiki6\n"
        "print(sorted({'fairseq', 'torch', 'gensim', 'tqdm', 'yaml'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=str(PREPROCESS), env=env, stdout=subprocess.PIPE)
    assert done.stdout == b"[]\n"


def test_item_too_long_for_the_index(tmp_path):
    with pytest.raises(UserError, match="longer than"):
        with data_bin.index_writer(tmp_path / "x.idx", 1) as add_items:
            add_items(np.array([0, 2**31]))


def test_offsets_beyond_four_gigabytes(tmp_path):
    edges = np.array([0, 2**31 - 1, 2**32 - 2, 2**32 + 5])
    with data_bin.index_writer(tmp_path / "ours.idx", 3) as add_items:
        add_items(edges[:2])
        add_items(edges[1:])
    with MMapIndexedDataset.Index.writer(str(tmp_path / "its.idx"), np.uint16) as index:
        index.write(np.diff(edges).tolist())
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "its.idx").read_bytes()
