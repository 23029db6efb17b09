"""The one loop that reads a text for a score."""

import math
from typing import NamedTuple, Optional

import numpy as np
import torch
from tqdm import tqdm

from fairseq_sha.models.segment_decoder import SegmentDecoder


class Score(NamedTuple):
    """What a text cost, and how it was read."""

    nats: float  # in all
    tokens: int
    bytes: int  # of the original text
    words: Optional[int]  # see codecs.Words; None if the text has none
    policy: str

    @property
    def bits_per_byte(self):
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self):
        """Per token."""
        return _exp(self.nats / self.tokens)

    @property
    def perplexity_per_word(self):
        return None if self.words is None else _exp(self.nats / self.words)

    def __str__(self):
        figures = [
            f"{self.nats / self.tokens:.4f} nats per token",
            f"{self.bits_per_byte:.4f} bits per byte",
            f"perplexity {_written(self.perplexity)} per token",
        ]
        counted = [f"{self.tokens:,} tokens", f"{self.bytes:,} bytes"]
        if self.words is not None:
            figures.append(f"{_written(self.perplexity_per_word)} per word")
            counted.append(f"{self.words:,} words")
        return f"{', '.join(figures)} ({', '.join(counted)}; {self.policy})"


class Tally:
    """Sums over what has been read so far."""

    def __init__(self):
        self.nats, self.tokens, self.bytes, self.words = 0.0, 0, 0, 0

    def add(self, batch, nats):
        """Count a batch and its cost."""
        self.nats += nats
        self.tokens += batch["ntokens"]
        self.bytes += batch.get("nbytes", 0)
        self.words += batch.get("nwords", 0)

    def score(self, policy):
        """The :class:`Score`."""
        return Score(self.nats, self.tokens, self.bytes, self.words or None, str(policy))


def _exp(value):
    """``math.exp``, but infinity where that overflows, as the cost of a diverged model may do."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _written(perplexity):
    """A perplexity as text. A text that a model finds impossible has one of a hundred digits."""
    return f"{perplexity:,.3f}" if perplexity < 1e12 else f"{perplexity:.3e}"


def token_losses(model, batch):
    """The cost of each target of a batch in nats, ``[B, T]``; those of padding mean nothing."""
    net_input, targets = inputs_of(model, batch)
    if isinstance(model.decoder, SegmentDecoder):
        return model(**net_input, targets=targets)[0]
    log_probs = model.get_normalized_probs(model(**net_input), log_probs=True)
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def inputs_of(model, batch):
    """What a batch gives to the model, and its targets ``[B, T]``, on the model's device."""
    device = next(model.parameters()).device
    net_input = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch["net_input"].items()
    }
    return net_input, batch["target"].to(device)


def evaluate(model, corpus, split, codec, policy, progress=False, losses=token_losses):
    """Read a split.

    Args:
        model (~fairseq.models.FairseqLanguageModel): in evaluation mode
        corpus (Corpus): the split: any object with ``tokens``, and as its length the number of its
            predictions
        split (str): its name
        codec (~fairseq_sha.data.codecs.Codec): what its tokens stand for
        policy (~fairseq_sha.evaluation.policies.Policy): how it is read
        progress (bool): whether to show progress on standard error, if that is a terminal
        losses (callable): from the model and a batch to the cost of each target, ``[B, T]``

    Returns:
        the :class:`Score`, and the cost of each prediction in nats, float32 ``[len(corpus)]``
    """
    tally = Tally()
    disable = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=len(corpus), unit="token", unit_scale=True, disable=disable)
    with bar, policy.reading(model, losses) as read:
        batches = policy.batches(corpus, split, codec)
        costs = read_batches(batches, read, len(corpus), tally, bar.update)
    return tally.score(policy), costs


def read_batches(batches, read, predictions, tally, progress=None):
    """Read a text, or one part of it after the other.

    Args:
        batches: of a policy
        read (callable): what the policy's ``reading`` yields
        predictions (int): of the text or its part
        tally (Tally): to which the text is added
        progress (callable): is given the number of tokens after each batch; or None

    Returns:
        the cost of each prediction in nats, float32 ``[predictions]``
    """
    costs = np.full(predictions, np.nan, dtype=np.float32)
    for index in range(len(batches)):
        batch = batches[index]
        costs_of_batch = read(batch).double().cpu().numpy()
        nats = 0.0
        for row, (first, context, count) in enumerate(batches.rows(index)):
            scored = costs_of_batch[row, context : context + count]
            costs[first : first + count] = scored
            nats += float(scored.sum())
        tally.add(batch, nats)
        if progress is not None:
            progress(batch["ntokens"])
    return costs
