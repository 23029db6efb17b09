"""A corpus cut into segments of parallel streams, each prediction in exactly one of them.

A corpus of ``N`` tokens holds ``N - 1`` predictions: each token but the first, given what came
before. ``S`` streams own contiguous runs of them, and all streams are read side by side, one
segment after the other, by models that keep their state in between.
"""

from typing import NamedTuple

import numpy as np
import torch
from fairseq.data import FairseqDataset


class SegmentId(NamedTuple):
    """Which segment a batch is. It travels as the string ``split:epoch:index``, which passes
    through data workers and pinned memory unchanged."""

    split: str
    epoch: int
    index: int

    def __str__(self):
        return f"{self.split}:{self.epoch}:{self.index}"

    @classmethod
    def parse(cls, text):
        split, epoch, index = text.rsplit(":", 2)
        return cls(split, int(epoch), int(index))


def stream_bounds(num_predictions, num_streams):
    """Where each stream's run of predictions begins and ends.

    Returns:
        int64 array ``[num_streams + 1]``: stream ``s`` owns predictions ``bounds[s]`` up to, not
        including, ``bounds[s + 1]``. Runs differ in length by at most one, the longest first.
    """
    shortest, longer = divmod(num_predictions, num_streams)
    streams = np.arange(num_streams + 1, dtype=np.int64)
    return streams * shortest + np.minimum(streams, longer)


def segment_lengths(total, tokens_per_sample, rng=None):
    """Lengths in tokens of the segments that cover ``total`` predictions of the longest stream.

    Args:
        total (int): predictions to cover
        tokens_per_sample (int): the length of all segments but the last, or the maximum at random
        rng (numpy.random.RandomState): draw the lengths at random, as SHA-RNN's published training
            does: the mean is ``tokens_per_sample`` with probability 0.95, else half of it; the
            standard deviation is 5 tokens; at least 5, at most ``tokens_per_sample`` tokens.
    """
    if rng is None:
        lengths = np.full(-(-total // tokens_per_sample), tokens_per_sample)
    else:
        shortest = min(5, tokens_per_sample)
        draws = -(-total // shortest)
        mean = np.where(rng.random_sample(draws) < 0.95, 1.0, 0.5) * tokens_per_sample
        lengths = rng.normal(mean, 5).astype(np.int64).clip(shortest, tokens_per_sample)
    ends = lengths.cumsum().clip(max=total)
    ends = ends[: np.searchsorted(ends, total) + 1]
    return np.diff(ends, prepend=0)


class SegmentDataset(FairseqDataset):
    """The segments of one epoch, as one worker reads them: item ``i`` is the whole batch ``i``.

    Args:
        corpus (Corpus): the split
        split (str): its name, the first part of the segments' identity
        epoch (int): counted from one
        pad (int): token id that fills up the ends of shorter streams; such targets are not scored
        batch_size (int): streams of each worker
        tokens_per_sample (int): segment length in tokens
        random_lengths (bool): draw segment lengths at random, from seed and epoch alone
        seed (int): for random lengths
        num_shards (int): workers that share the corpus; there are ``batch_size * num_shards``
            streams in all
        shard (int): which of them this is
        codec (~fairseq_sha.data.codecs.Codec): says how many bytes, and words if it knows words,
            the targets of a batch stand for; None to leave that out
    """

    def __init__(
        self,
        corpus,
        split,
        epoch,
        pad,
        batch_size,
        tokens_per_sample,
        random_lengths=False,
        seed=1,
        num_shards=1,
        shard=0,
        codec=None,
        filler=None,
    ):
        super().__init__()
        self.corpus = corpus
        self.split = split
        self.epoch = epoch
        self.pad = pad
        self.filler = filler
        self.batch_size = batch_size
        self.tokens_per_sample = tokens_per_sample
        self.random_lengths = random_lengths
        self.seed = seed
        self.num_streams = batch_size * num_shards
        bounds = stream_bounds(len(corpus), self.num_streams)
        rng = np.random.RandomState([seed, epoch]) if random_lengths else None
        # All workers cut by the longest stream of all, so that all have as many segments.
        lengths = segment_lengths(int(bounds[1]), tokens_per_sample, rng)
        self.offsets = np.append(0, lengths.cumsum())
        self.first_stream = shard * batch_size
        self.bounds = bounds[self.first_stream : self.first_stream + batch_size + 1]
        self.worth = {}  # what to count of a batch's targets -> how much each token id adds
        if codec is not None:
            self.worth["nbytes"] = codec.bytes_per_token()
            if codec.counts_words:
                self.worth["nwords"] = codec.is_word().astype(np.int64)

    def __len__(self):
        return len(self.offsets) - 1

    def segmentation(self):
        """Everything that a position in the epoch depends on."""
        return {
            "corpus": self.corpus.fingerprint(),
            "number of streams": self.num_streams,
            "segment length": self.tokens_per_sample,
            "choice of random segment lengths": self.random_lengths,
            "seed": self.seed if self.random_lengths else None,
        }

    def __getitem__(self, index):
        """Segment ``index`` of ``T`` tokens: ``src_tokens`` and ``target``, ``[batch_size, T]``.
        Also how many targets there are (``ntokens``), and how many bytes and words they are."""
        start, end = self.offsets[index], self.offsets[index + 1]
        window = np.full((self.batch_size, end - start + 1), self.pad, dtype=np.int64)
        num_targets = 0
        for row, (first, stop) in enumerate(zip(self.bounds[:-1] + start, self.bounds[1:])):
            # Prediction i reads token i and has token i + 1 as its target.
            count = min(end - start, stop - first)
            if count > 0:
                window[row, : count + 1] = self.corpus.tokens[first : first + count + 1]
                num_targets += int(count)
        worth = {key: int(table[window[:, 1:]].sum()) for key, table in self.worth.items()}
        window = torch.from_numpy(window)
        streams = torch.arange(self.first_stream, self.first_stream + self.batch_size)
        inputs = window[:, :-1].contiguous()
        identity = {"segment": str(SegmentId(self.split, self.epoch, int(index)))}
        if self.filler is not None:
            inputs, identity = inputs.masked_fill(inputs == self.pad, self.filler), {}
        return {
            "id": index * self.num_streams + streams,
            "nsentences": self.batch_size,
            "ntokens": num_targets,
            **worth,
            "net_input": {
                "src_tokens": inputs,
                "src_lengths": torch.full((self.batch_size,), int(end - start)),
                **identity,
            },
            "target": window[:, 1:].contiguous(),
        }

    def collater(self, samples):
        """An item is a batch already."""
        (batch,) = samples
        return batch
