"""A softmax temperature that is fitted on one split and used on another.

A model that is too sure of itself, or not sure enough, scores better if all its logits are
multiplied by a factor, which is one over the temperature. Published scores of G. Melis et al.
(arXiv 1707.05589 and 1909.01792) include such a factor.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fairseq_sha.evaluation.evaluate import inputs_of
from fairseq_sha.models.heads import MAX_LOGITS
from fairseq_sha.models.segment_decoder import SegmentDecoder

#: The factors that the published code tries.
FACTORS = tuple(round(0.8 + 0.02 * i, 2) for i in range(14))


class Fit(NamedTuple):
    """The best of :data:`FACTORS` on a split."""

    split: str
    factor: float

    def losses(self):
        """What :func:`~fairseq_sha.evaluation.evaluate.evaluate` takes as ``losses``."""
        return partial(_losses_at, factors=[self.factor], only=True)

    def __str__(self):
        end = " (the end of the range)" if self.factor in (FACTORS[0], FACTORS[-1]) else ""
        return f"logits times {self.factor:.2f}{end}, fitted on {self.split}"


def fit_temperature(model, corpus, split, codec, policy, progress=False):
    """Find the factor with which a split costs least. The cost is convex in the factor, so that
    there are no other minima. All factors are tried in one pass.

    Arguments are those of :func:`~fairseq_sha.evaluation.evaluate.evaluate`.

    Returns:
        the :class:`Fit`
    """
    batches = policy.batches(corpus, split, codec)
    totals = np.zeros(len(FACTORS))
    disable = None if progress else True
    with tqdm(total=len(corpus), unit="token", unit_scale=True, disable=disable) as bar:
        for index in range(len(batches)):
            batch = batches[index]
            scored = batch["target"] != codec.dictionary.pad()
            losses = _losses_at(model, batch, FACTORS).double().cpu()
            totals += losses[:, scored].sum(1).numpy()
            bar.update(batch["ntokens"])
    return Fit(split, FACTORS[int(totals.argmin())])


@torch.no_grad()
def _losses_at(model, batch, factors, only=False):
    """The cost of each target of a batch in nats for each factor, ``[len(factors), B, T]``, or
    ``[B, T]`` for the only one; those of padding mean nothing."""
    net_input, targets = inputs_of(model, batch)
    if isinstance(model.decoder, SegmentDecoder):
        rows, _ = model.decoder.extract_features(
            net_input["src_tokens"], segment=net_input.get("segment")
        )
        log_probs = model.decoder.head.log_probs
    else:
        rows, log_probs = model.get_normalized_probs(model(**net_input), log_probs=True), _same
    rows, flat = rows.flatten(0, 1), targets.flatten()
    size = max(1, MAX_LOGITS // len(model.decoder.dictionary))
    pieces = []
    for piece, of_piece in zip(rows.split(size), flat.split(size)):
        p = log_probs(piece)
        chosen = p.gather(1, of_piece.unsqueeze(1)).squeeze(1)
        # Log-probabilities are logits less a constant, which cancels out.
        pieces.append(torch.stack([(f * p).logsumexp(1) - f * chosen for f in factors]))
    losses = torch.cat(pieces, 1).unflatten(1, targets.shape)
    return losses[0] if only else losses


def _same(log_probs):
    return log_probs
