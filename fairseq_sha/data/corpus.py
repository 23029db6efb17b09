"""One split of a corpus as a flat array of token ids."""

import os
import zlib

import numpy as np
from fairseq.data import FairseqDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, data_file_path, index_file_path

from fairseq_sha.errors import UserError

TOKENS_AT_ONCE = 1 << 20  # read at once: few enough for the processor's cache


class Corpus(FairseqDataset):
    """A split: ``total_tokens`` token ids, memory-mapped, hence ``total_tokens - 1`` predictions.

    ``len()`` is the number of predictions, which is what is trained on and scored.

    Args:
        prefix (str): the data folder and the name of the split, such as ``data-bin/enwik8/train``

    Raises:
        UserError: a file is missing, is not in fairseq's memory-mapped format, was cut short, or
            holds fewer than two tokens.
    """

    def __init__(self, prefix):
        super().__init__()
        self.path = data_file_path(prefix)
        index_path = index_file_path(prefix)
        for path in (index_path, self.path):
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file; preprocess the corpus, or name its folder")
        index = _open_index(index_path)
        self.dtype, self.total_tokens = np.dtype(index.dtype), int(index.sizes.sum(dtype="int64"))
        if os.path.getsize(self.path) != self.total_tokens * self.dtype.itemsize:
            raise UserError(
                f"{self.path}: its size differs from what {index_path} says; "
                "preprocess the corpus again"
            )
        if self.total_tokens < 2:
            raise UserError(f"{self.path}: fewer than two tokens, so there is nothing to predict")
        self._tokens = None

    @property
    def tokens(self):
        """The token ids. Opened at first use in each process, since pickling a map copies it."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._tokens

    def find(self, condition):
        """The offset of the first token for which a condition holds, or None.

        Args:
            condition (callable): from an array of token ids to an array of bool
        """
        for start, tokens in self.parts():
            found = condition(tokens)
            if found.any():
                return start + int(found.argmax())
        return None

    def counts(self, size):
        """How often each token occurs: ``[size]``, or more if there are larger token ids."""
        counts = np.zeros(size, np.int64)
        for _, tokens in self.parts():
            found = np.bincount(tokens, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        return counts

    def parts(self):
        """All tokens in parts of at most ``TOKENS_AT_ONCE``: pairs of an offset and an array."""
        for start in range(0, self.total_tokens, TOKENS_AT_ONCE):
            # A new map each time: pages that were read count as memory of this process.
            tokens = np.memmap(
                self.path,
                dtype=self.dtype,
                mode="r",
                offset=start * self.dtype.itemsize,
                shape=min(TOKENS_AT_ONCE, self.total_tokens - start),
            )
            yield start, tokens

    def sample(self):
        """About a thousand tokens, spread evenly over the corpus."""
        return self.tokens[:: -(-self.total_tokens // 1000)]

    def fingerprint(self):
        """A string that almost certainly differs for another corpus: its length, and a checksum of
        :meth:`sample`."""
        return f"{self.total_tokens}-{zlib.crc32(self.sample().tobytes()):08x}"

    def __getstate__(self):
        return {**self.__dict__, "_tokens": None}

    def __len__(self):
        return self.total_tokens - 1


def _open_index(path):
    magic = MMapIndexedDataset.Index._HDR_MAGIC
    try:
        with open(path, "rb") as file:
            if not file.read(26).startswith(magic) or file.tell() < 26:
                raise ValueError("wrong header")
        return MMapIndexedDataset.Index(path)
    except (ValueError, KeyError, AssertionError, OverflowError):
        raise UserError(
            f"{path}: not an index in fairseq's mmap format; preprocess the corpus again"
        )
