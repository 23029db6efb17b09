"""How a text is cut up for a score. A score means something only together with its policy."""

from typing import NamedTuple

from fairseq_sha.data.segments import SegmentDataset, WindowDataset


class Carried(NamedTuple):
    """Segments follow each other, and the model carries state from each to the next. Without state,
    each segment starts from nothing.

    Args:
        streams: parts of the text that are read side by side, each of which starts from nothing
        length: tokens of a segment
        has_state: whether the model carries state
        begun: segments of the text that were read before, if this is a part of it
    """

    streams: int
    length: int
    has_state: bool = True
    begun: int = 0

    def batches(self, corpus, split, codec, num_shards=1, shard=0):
        """The batches of a split, for ``fairseq``'s iterators and for :func:`evaluate`.

        Args:
            corpus (Corpus): the split
            split (str): its name
            codec (~fairseq_sha.data.codecs.Codec): what its tokens stand for
            num_shards (int): workers that share the batches
            shard (int): which of them this is
        """
        return SegmentDataset(
            corpus,
            split if self.has_state else None,
            1,
            codec.dictionary.pad(),
            batch_size=self.streams,
            tokens_per_sample=self.length,
            num_shards=num_shards,
            shard=shard,
            codec=codec,
            filler=None if self.has_state else codec.start,
            first_index=self.begun,
        )

    def __str__(self):
        kind = "state carried" if self.has_state else "no state"
        return f"{kind}, {self.streams} streams, segments of {self.length}"


class Sliding(NamedTuple):
    """Each prediction sees at least ``context`` tokens besides the one that it reads, and is made
    once. For models that carry no state.

    Args:
        windows: how many windows are read side by side, which does not change the score
        context: tokens
        stride: predictions of each window
    """

    windows: int
    context: int
    stride: int

    @property
    def length(self):
        """Tokens that the model reads at once."""
        return self.context + self.stride

    def batches(self, corpus, split, codec, num_shards=1, shard=0):
        """As :meth:`Carried.batches`."""
        return WindowDataset(
            corpus,
            codec.dictionary.pad(),
            self.windows,
            self.context,
            self.stride,
            num_shards=num_shards,
            shard=shard,
            codec=codec,
            filler=codec.start,
        )

    def __str__(self):
        return f"sliding window, context of at least {self.context}, stride {self.stride}"
