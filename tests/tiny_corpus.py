"""Small corpora for tests, written by fairseq itself."""

import tempfile
from collections import Counter
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from numpy import uint16

from fairseq_sha.data.byte_dictionary import ByteDictionary


def text(size, seed=1):
    """Bytes with something to learn: a chain, always the same, over a small alphabet."""
    alphabet = b"abcdefgh \n"
    generator = torch.Generator().manual_seed(0)
    chain = torch.rand(len(alphabet), len(alphabet), generator=generator).pow(6)
    generator.manual_seed(seed)
    out, last = bytearray(), 0
    while len(out) < size:
        last = int(torch.multinomial(chain[last], 1, generator=generator))
        out.append(alphabet[last])
    return bytes(out)


def write_split(data, folder=None, split="train", dictionary=None):
    """Write ``data`` as one split; returns its prefix. Without a dictionary, make and save one."""
    folder = Path(folder or tempfile.mkdtemp())
    if dictionary is None:
        plain = Dictionary()
        for value, count in Counter(data).items():
            if value != 10:
                plain.add_symbol(str(value), n=count)
        plain.finalize()
        plain.save(str(folder / "dict.txt"))
        dictionary = ByteDictionary.load(str(folder / "dict.txt"))
    prefix = folder / split
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=uint16)
    for line in data.splitlines(keepends=True):
        builder.add_item(dictionary.encode(line))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_folder(folder, train=6000, valid=701, test=833):
    """A data folder with three splits of the given numbers of bytes."""
    write_split(text(train, 1), folder)
    dictionary = ByteDictionary.load(str(Path(folder) / "dict.txt"))
    write_split(text(valid, 2), folder, "valid", dictionary)
    write_split(text(test, 3), folder, "test", dictionary)
    return str(folder)
