"""Output heads: what the last layer's features say about the next token.

A head answers three questions: ``logits``, ``log_probs`` and ``losses``. Training, validation and
scoring ask for the losses only, which never takes the logits of the whole vocabulary for more than
some of the targets at a time.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_sha.ops import dropout

#: Losses are computed for so many targets at a time that their logits are no more than these: 256
#: MB in float32.
MAX_LOGITS = 1 << 26

#: The log-probability of what is impossible: e to this power is 0 in every floating type, and
#: unlike minus infinity it survives arithmetic.
NO_PROBABILITY = -1e4


class SoftmaxHead(nn.Module):
    """``softmax(W h + b)`` over the whole vocabulary.

    Args:
        width (int): ``H``
        vocabulary (int): ``V``
        tied_weight (nn.Parameter): ``W [V, H]``, shared with the embedding; None for a weight of
            its own
    """

    def __init__(self, width, vocabulary, tied_weight=None):
        super().__init__()
        if tied_weight is not None:
            self.weight = tied_weight
            self.bias = nn.Parameter(torch.zeros(vocabulary))
        else:
            linear = nn.Linear(width, vocabulary)
            self.weight, self.bias = linear.weight, linear.bias

    def logits(self, features):
        """Unnormalised log-probabilities: ``[..., H] -> [..., V]``."""
        return F.linear(features, self.weight, self.bias)

    def log_probs(self, features):
        """Log-probabilities in float32 or wider: ``[..., H] -> [..., V]``."""
        return widen(self.logits(features)).log_softmax(-1)

    def losses(self, features, targets, training=False):
        """The cost of each target in nats.

        Args:
            features (Tensor): ``[..., H]``
            targets (LongTensor): ``[...]``
            training (bool): whether dropout acts; this head has none

        Returns:
            Tensor ``[...]``, in float32 or wider
        """
        losses = _losses(self.logits, len(self.bias), features.flatten(0, -2), targets.flatten())
        return losses.view(targets.shape)


class AdaptiveSoftmaxHead(nn.Module):
    """A softmax over the words of the first band and one entry for each other band, and a softmax
    within each of these (E. Grave et al., arXiv 1609.04309)::

        p(w) = p_0(w)              in band 0
        p(w) = p_0(band i) p_i(w)  in band i

    The probabilities of all words add up to 1: this is a model, not an approximation of a softmax
    over the vocabulary. Logits are ``E_i P_i^T h + b_i``, with the embedding's ``E_i``, and its
    ``P_i`` where :class:`~fairseq_sha.models.embeddings.Bands` ties them.

    Args:
        embedding (~fairseq_sha.models.embeddings.AdaptiveEmbedding)
    """

    def __init__(self, embedding):
        super().__init__()
        bands = self.bands = embedding.bands
        in_hidden_space = bands.cluster_space == "hidden"
        self.weight = embedding.weight
        self.tail_weights = embedding.tail_weights
        self.projections = nn.ParameterList()
        # With clusters in hidden space, fairseq projects the first band only where it must.
        self.head_projected = bands.projected and not (
            in_hidden_space and bands.widths[0] == bands.width
        )
        for i, projection in enumerate(embedding.projections):
            tied = bands.tied_projections in (["all"] if i == 0 else ["all", "tails"])
            if i == 0 and not self.head_projected:
                projection = None
            elif not tied:
                projection = nn.Parameter(torch.empty_like(projection))
                nn.init.xavier_uniform_(projection)
            if projection is not None:
                self.projections.append(projection)
        clusters = len(bands.widths) - 1
        self.cluster_weight = nn.Parameter(
            torch.empty(clusters, bands.width if in_hidden_space else bands.widths[0])
        )
        nn.init.xavier_uniform_(self.cluster_weight)
        self.tail_biases = nn.ParameterList()
        if bands.biases:
            self.bias = nn.Parameter(torch.zeros(bands.sizes[0]))
            self.tail_biases.extend([torch.zeros(size) for size in bands.sizes[1:]])
            self.cluster_bias = nn.Parameter(torch.zeros(clusters))
        else:
            self.bias = self.cluster_bias = None
        self.register_buffer("edges", torch.tensor(bands.edges[1:-1]), persistent=False)

    def logits(self, features):
        """Log-probabilities, which are logits too: ``[..., H] -> [..., V]``."""
        return self.log_probs(features)

    def log_probs(self, features, training=False):
        """Log-probabilities in float32 or wider: ``[..., H] -> [..., V]``;
        :data:`NO_PROBABILITY` for what has no embedding."""
        size = self.bands.sizes[0]
        head = widen(self._head_logits(features, training)).log_softmax(-1)
        no_word = head.new_full((*head.shape[:-1], self.bands.first), NO_PROBABILITY)
        parts = [no_word, head[..., :size]]
        for i in range(1, len(self.bands.widths)):
            within = widen(self._tail_logits(i, features, training)).log_softmax(-1)
            parts.append(within + head[..., size + i - 1, None])
        return torch.cat(parts, -1)

    def losses(self, features, targets, training=False):
        """The cost of each target in nats, in the order of the targets. Arguments as for
        :meth:`SoftmaxHead.losses`."""
        losses = 0.0
        for logits, columns, h, classes, places in self._parts(features, targets, training):
            part = _losses(logits, columns, h, classes)
            losses = part if places is None else losses.index_add(0, places, part)
        return losses.view(targets.shape)

    def _parts(self, features, targets, training):
        """The softmaxes that targets take part in, one after another: a function from hidden states
        to logits, how many there are, the hidden states ``[n, H]``, the target classes ``[n]``, and
        which of all targets these are; None for all."""
        size = self.bands.sizes[0]
        h = features.flatten(0, -2)
        rows, band, places = self.bands.locate(targets.flatten(), self.edges)
        classes = torch.where(band == 0, rows, size - 1 + band)
        columns = size + len(places) - 1
        yield lambda x: self._head_logits(x, training), columns, h, classes, None
        # A band without targets takes part, so that its parameters get a gradient on all workers.
        for i in range(1, len(places)):

            def logits(x, i=i):
                return self._tail_logits(i, x, training)

            classes = rows[places[i]] - self.bands.edges[i]
            yield logits, self.bands.sizes[i], h[places[i]], classes, places[i]

    def _head_logits(self, h, training=False):
        x = h
        if self.head_projected:
            x = h @ self.projections[0]
        x = dropout(x, self.bands.p, training)
        words = F.linear(x, self.weight, self.bias)
        if self.bands.cluster_space == "embedding":
            h = x
        return torch.cat([words, F.linear(h, self.cluster_weight, self.cluster_bias)], -1)

    def _tail_logits(self, i, h, training=False):
        if self.bands.projected:
            h = h @ self.projections[i - (not self.head_projected)]
        h = dropout(h, self.bands.p, training)
        bias = self.tail_biases[i - 1] if self.bands.biases else None
        return F.linear(h, self.tail_weights[i - 1], bias)

    # What fairseq's criterion adaptive_loss and its decoders ask of an adaptive softmax.

    def forward(self, features, targets):
        """Logits and target classes of each softmax, a list each; None for a band without targets.

        The criterion leaves out every class that has the number of ``<pad>``, in all bands. So
        classes are shifted by impossible ones, and only padding has that number.
        """
        all_logits, all_classes = [], []
        padding = targets.flatten() < self.bands.first
        for logits, _, h, classes, places in self._parts(features, targets, self.training):
            if not len(classes):
                all_logits.append(None)
                all_classes.append(None)
                continue
            impossible = h.new_full((len(h), self.bands.first), NO_PROBABILITY)
            all_logits.append(torch.cat([impossible, logits(h)], -1))
            classes = classes + self.bands.first
            if places is None:
                classes = torch.where(padding, targets.flatten(), classes)
            all_classes.append(classes)
        return all_logits, all_classes

    def get_log_prob(self, features, target=None):
        """:meth:`log_probs`."""
        return self.log_probs(features, self.training)


def _losses(logits, columns, h, targets):
    """Cross-entropies in nats, in float32 or wider, of some targets after another, whose logits
    are computed again for the gradient.

    Args:
        logits (callable): ``[n, H] -> [n, columns]``
        columns (int): the number of classes
        h (Tensor): ``[N, H]``
        targets (LongTensor): classes, ``[N]``

    Returns:
        Tensor ``[N]``
    """

    def losses(h, targets):
        return F.cross_entropy(widen(logits(h)), targets, reduction="none")

    rows = max(1, MAX_LOGITS // columns)
    if len(h) <= rows:
        return losses(h, targets)
    if torch.is_grad_enabled():
        # Logits and their gradient would take several times the memory of the model.
        pieces = [
            checkpoint(losses, *piece, use_reentrant=False)
            for piece in zip(h.split(rows), targets.split(rows))
        ]
    else:
        pieces = [losses(*piece) for piece in zip(h.split(rows), targets.split(rows))]
    return torch.cat(pieces)


def widen(x):
    """``x`` in float32, or wider if it is: half precision is too coarse for a normaliser."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
