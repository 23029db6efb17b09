"""A corpus cut into batches.

A corpus of ``N`` tokens holds ``N - 1`` predictions: each token except the first, given the tokens
before it. :class:`SegmentDataset` is for models that carry state: ``S`` streams own contiguous runs
of predictions, and all streams are read side by side, one segment after the other. Two others are
for models that carry none: :class:`RandomWindowDataset` trains them on windows from random places,
and not on every prediction once; :class:`WindowDataset` evaluates them, and gives each prediction a
context again.
"""

import abc
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


class _Batches(FairseqDataset, abc.ABC):
    """Item ``i`` is the whole batch ``i``. A subclass says in ``rows`` which predictions are in it.

    Args:
        corpus (Corpus): the split
        pad (int): token id that fills up rows; such targets are not scored
        codec (~fairseq_sha.data.codecs.Codec): says how many bytes the targets of a batch stand
            for, and how many words begin in them; None to leave that out
        filler (int): token id that fills up inputs; None for ``pad``
        num_targets (int): how many tokens ahead each position predicts
    """

    def __init__(self, corpus, pad, codec=None, filler=None, num_targets=1):
        super().__init__()
        self.corpus = corpus
        self.pad = pad
        self.filler = pad if filler is None else filler
        self.num_targets = num_targets
        self.bytes_per_token = None if codec is None else codec.bytes_per_token()
        self.words = None if codec is None else codec.words

    @abc.abstractmethod
    def rows(self, index):
        """What each row of a batch holds: a list of ``(first, context, count)``. The row's targets
        are predictions ``first`` to ``first + count``; ``context`` positions come before them."""

    @abc.abstractmethod
    def length(self, index):
        """Positions of each row."""

    def __getitem__(self, index):
        """Batch ``index`` of ``T`` positions: ``src_tokens`` and ``target``, ``[B, T]``. Also how
        many targets there are (``ntokens``), and how many bytes and words they are."""
        rows, length = self.rows(index), self.length(index)
        inputs = np.full((len(rows), length), self.filler, dtype=np.int64)
        targets = np.full((self.num_targets, *inputs.shape), self.pad, dtype=np.int64)
        for row, (first, context, count) in enumerate(rows):
            if count == 0:
                continue
            # Prediction i reads token i and has token i + 1 as its target. A row that reaches the
            # end of the corpus goes on at its beginning.
            until_end = min(count, len(self.corpus) - first)
            self._fill(inputs[row], targets[:, row], 0, first, context, until_end)
            if until_end < count:
                self._fill(inputs[row], targets[:, row], until_end, 0, 0, count - until_end)
        worth = {}
        if self.words is not None:
            worth["nbytes"] = int(self.bytes_per_token[targets[0]].sum())
            worth["nwords"] = int(self.words.begun(targets[0], inputs).sum())
        targets = torch.from_numpy(targets)
        net_input = {
            "src_tokens": torch.from_numpy(inputs),
            "src_lengths": torch.full((len(rows),), length),
        }
        if self.num_targets > 1:
            net_input["further_targets"] = targets[1:]
        return {
            "id": index * len(rows) + torch.arange(len(rows)),
            "nsentences": len(rows),
            "ntokens": sum(count for _, _, count in rows),
            **worth,
            "net_input": net_input,
            "target": targets[0],
        }

    def _fill(self, inputs, targets, column, first, context, count):
        """Write predictions ``first`` to ``first + count`` into a row, from ``column`` on, with the
        ``context`` positions before them."""
        tokens = self.corpus.tokens[first - context : first + count + self.num_targets]
        inputs[column : column + context + count] = tokens[: context + count]
        for k in range(self.num_targets):
            ahead = tokens[context + 1 + k : context + 1 + k + count]
            targets[k, column + context : column + context + len(ahead)] = ahead

    def collater(self, samples):
        """An item is a batch already."""
        (batch,) = samples
        return batch


class SegmentDataset(_Batches):
    """The segments of one epoch, as one worker reads them. Row ``s`` of all batches is a stream.

    Args:
        corpus (Corpus): the split
        split (str): its name, the first part of the segments' identity; None for batches without
            identity, for models that carry no state
        epoch (int): counted from one
        pad (int): token id that fills up the ends of shorter streams; such targets are not scored
        batch_size (int): streams of each worker
        tokens_per_sample (int): segment length in tokens
        random_lengths (bool): draw segment lengths at random, from seed and epoch alone
        random_start (bool): begin the epoch at a random place, drawn from seed and epoch alone, and
            read the corpus as a cycle; its first token is never predicted
        seed (int): for random lengths and starts
        num_shards (int): workers that share the corpus; there are ``batch_size * num_shards``
            streams in all
        shard (int): which of them this is
        first_index (int): of the segments; not 0 if the corpus is a later part of a text
        **kwargs: ``codec``, ``filler`` and ``num_targets``, see :class:`_Batches`
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
        random_start=False,
        seed=1,
        num_shards=1,
        shard=0,
        first_index=0,
        **kwargs,
    ):
        super().__init__(corpus, pad, **kwargs)
        self.split = split
        self.first_index = first_index
        self.epoch = epoch
        self.batch_size = batch_size
        self.tokens_per_sample = tokens_per_sample
        self.random_lengths = random_lengths
        self.random_start = random_start
        self.seed = seed
        self.num_streams = batch_size * num_shards
        bounds = stream_bounds(len(corpus), self.num_streams)
        rng = np.random.RandomState([seed, epoch]) if random_lengths else None
        # All workers cut by the longest stream of all, so that all have as many segments.
        lengths = segment_lengths(int(bounds[1]), tokens_per_sample, rng)
        self.offsets = np.append(0, lengths.cumsum())
        self.first_stream = shard * batch_size
        self.bounds = bounds[self.first_stream : self.first_stream + batch_size + 1]
        starts = np.random.RandomState([seed, epoch, 1])
        self.start = int(starts.randint(len(corpus))) if random_start else 0

    def __len__(self):
        return len(self.offsets) - 1

    def segmentation(self):
        """Everything that a position in the epoch depends on."""
        return {
            "corpus": self.corpus.fingerprint(),
            "number of streams": self.num_streams,
            "segment length": self.tokens_per_sample,
            "choice of random segment lengths": self.random_lengths,
            "seed": self.seed if self.random_lengths or self.random_start else None,
            # Absent in checkpoints of versions without this choice.
            **({"choice of random starts": True} if self.random_start else {}),
        }

    def length(self, index):
        return int(self.offsets[index + 1] - self.offsets[index])

    def rows(self, index):
        length = self.length(index)
        firsts = self.bounds[:-1] + self.offsets[index]
        counts = (self.bounds[1:] - firsts).clip(0, length)
        firsts = (self.start + firsts) % len(self.corpus)
        return [(int(first), 0, int(count)) for first, count in zip(firsts, counts)]

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        batch["id"] = index * self.num_streams + self.first_stream + torch.arange(self.batch_size)
        if self.split is not None:
            segment = SegmentId(self.split, self.epoch, self.first_index + int(index))
            batch["net_input"]["segment"] = str(segment)
        return batch


class RandomWindowDataset(SegmentDataset):
    """Windows from random places of the corpus, as many in an epoch as there are segments, and each
    on its own: batches have no identity, so that no state is carried. Places are drawn from seed
    and epoch alone. Windows may overlap, and do not reach over the end of the corpus.

    Args: as for :class:`SegmentDataset`, without ``split`` and ``random_start``
    """

    def __init__(self, corpus, epoch, pad, batch_size, tokens_per_sample, **kwargs):
        super().__init__(corpus, None, epoch, pad, batch_size, tokens_per_sample, **kwargs)
        # Of all workers, so that their number changes nothing. No window is longer than a stream.
        latest = len(corpus) - np.diff(self.offsets)[:, None]
        draws = np.random.RandomState([self.seed, epoch, 2])
        places = draws.randint(latest + 1, size=(len(self), self.num_streams))
        self.places = places[:, self.first_stream : self.first_stream + batch_size]

    def segmentation(self):
        own = {"seed": self.seed, "choice of random windows": True}
        return {**super().segmentation(), **own}

    def rows(self, index):
        return [(int(first), 0, self.length(index)) for first in self.places[index]]


class WindowDataset(_Batches):
    """A sliding window over a split: each row reads ``context`` tokens again and predicts the next
    ``stride``. Only at the very beginning of the split is the context shorter.

    Args:
        corpus (Corpus): the split
        pad (int): token id of targets that are not scored
        batch_size (int): windows of a batch
        context (int): tokens that each prediction sees at least, besides the one that it reads
        stride (int): predictions of each window
        num_shards (int): workers that share the windows
        shard (int): which of them this is
        **kwargs: ``codec`` and ``filler``, see :class:`_Batches`
    """

    epoch = 1

    def __init__(self, corpus, pad, batch_size, context, stride, num_shards=1, shard=0, **kwargs):
        super().__init__(corpus, pad, **kwargs)
        self.batch_size = batch_size
        self.context = context
        self.stride = stride
        self.num_shards = num_shards
        self.shard = shard

    def __len__(self):
        windows = -(-len(self.corpus) // self.stride)
        return -(-windows // (self.batch_size * self.num_shards))

    def length(self, index):
        return self.context + self.stride

    def rows(self, index):
        window = (index * self.num_shards + self.shard) * self.batch_size
        firsts = (window + np.arange(self.batch_size)) * self.stride
        counts = (len(self.corpus) - firsts).clip(0, self.stride)
        contexts = np.minimum(firsts, self.context)
        return [tuple(map(int, row)) for row in zip(firsts, contexts, counts)]

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        # Where fairseq's scorer finds each row's first target.
        batch["start_indices"] = [context for _, context, _ in self.rows(index)]
        return batch
