"""How a text is cut up for a score. A score means something only together with its policy."""

import abc
import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch

from fairseq_sha.data.segments import SegmentDataset, WindowDataset


class Tokens:
    """A text in memory, for :func:`~fairseq_sha.evaluation.evaluate.evaluate`.

    Args:
        tokens (ndarray): token ids; the first is read and not predicted
    """

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens) - 1


class Policy(abc.ABC):
    """How a text is cut up, and what the model does with the parts. ``str`` describes it in a
    score."""

    @abc.abstractmethod
    def batches(self, corpus, split, codec):
        """The batches of a split.

        Args:
            corpus (Corpus): the split
            split (str): its name
            codec (~fairseq_sha.data.codecs.Codec): what its tokens stand for
        """

    @contextlib.contextmanager
    def reading(self, model, losses):
        """Within the block, the text is read.

        Args:
            model (~fairseq.models.FairseqLanguageModel): in evaluation mode
            losses (callable): from the model and a batch to the cost of each target, ``[B, T]``

        Yields:
            a function from a batch to the cost of each target in nats, ``[B, T]``, which is called
            for each batch, in order
        """
        yield torch.no_grad()(partial(losses, model))


@dataclass(frozen=True)
class Carried(Policy):
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

    def after(self, segments):
        """The policy for the rest of a text, of which so many segments have been read."""
        return replace(self, begun=segments)

    def batches(self, corpus, split, codec, num_shards=1, shard=0):
        """As :meth:`Policy.batches`, and for ``fairseq``'s iterators.

        Args:
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


@dataclass(frozen=True)
class Sliding(Policy):
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
