"""Adaptive input: narrower embeddings for rarer words, in bands of the vocabulary."""

from dataclasses import dataclass, field
from typing import List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts
from fairseq_sha.errors import UserError
from fairseq_sha.ops import dropout

TIED_PROJECTIONS = ChoiceEnum(["none", "tails", "all"])
CLUSTER_SPACES = ChoiceEnum(["embedding", "hidden"])


@dataclass
class AdaptiveConfig(FairseqDataclass):
    """Options of a family whose vocabulary may be cut into bands. The defaults make one band."""

    cutoffs: List[int] = field(
        default_factory=list,
        metadata={
            "help": "cut the vocabulary into bands of ever rarer words, for an adaptive input and "
            "softmax: how many words come before each band but the first, such as "
            "20000,40000,200000; [] for a softmax over the whole vocabulary (default: as for bytes)"
        },
    )
    div_val: float = field(
        default=1.0,
        metadata={"help": "each band's embeddings are narrower by this factor (default: as wide)"},
    )
    embedding_width: int = field(
        default=0,
        metadata={"help": "width of the first band's embeddings; 0 for width (default: width)"},
    )
    tied_projections: TIED_PROJECTIONS = field(
        default="all",
        metadata={
            "help": "bands whose output projection is their input projection (default: as in "
            "SRU++ on WikiText-103)"
        },
    )
    band_biases: bool = field(
        default=True,
        metadata={"help": "add biases in the adaptive softmax (default: as in Transformer-XL)"},
    )
    cluster_space: CLUSTER_SPACES = field(
        default="embedding",
        metadata={
            "help": "what is compared with the vectors that stand for bands in the first band's "
            "softmax: its projection, or, as in fairseq, the hidden state itself "
            "(default: as in Transformer-XL and SRU++)"
        },
    )
    dropout_projection: float = field(
        default=0.0,
        metadata={
            "help": "dropout of embeddings before their projection, and of hidden states after "
            "theirs (default: none)"
        },
    )


class Bands(NamedTuple):
    """How a vocabulary of ``V`` tokens is cut. A row is a token id less ``first``: the symbols
    before ``</s>``, ``<s>`` and ``<pad>``, are no words and have no embedding."""

    width: int  # H
    first: int  # the token id of row 0
    edges: Tuple[int, ...]  # rows: 0, the cutoffs, V - first
    widths: Tuple[int, ...]  # of the embeddings of each band
    projected: bool  # whether embeddings are projected to H
    tied_projections: str
    biases: bool
    cluster_space: str
    p: float  # dropout

    @property
    def sizes(self):
        """The number of rows of each band."""
        return [end - start for start, end in zip(self.edges, self.edges[1:])]

    def locate(self, tokens, edges):
        """Sort tokens by band.

        Args:
            tokens (LongTensor): ``[N]``; what has no row counts as row 0, since padding must be
                read and scored as something
            edges (LongTensor): the cutoffs, on the tokens' device

        Returns:
            the row of each token, ``[N]``; its band, ``[N]``; for each band a LongTensor with the
            places of its tokens
        """
        rows = (tokens - self.first).clamp(min=0)
        band = torch.bucketize(rows, edges, right=True)
        # One wait for a GPU instead of one for each band.
        counts = torch.bincount(band, minlength=len(self.widths)).tolist()
        return rows, band, band.argsort(stable=True).split(counts)


def bands(cfg, dictionary):
    """The :class:`Bands` of an :class:`AdaptiveConfig`, or None for a single band.

    Args:
        cfg: with ``width``, too
        dictionary (~fairseq.data.Dictionary): ``</s>`` comes first of the words

    Raises:
        UserError: settings that make no bands
    """
    cutoffs = list(cfg.cutoffs)
    if not cutoffs:
        return None
    first = dictionary.eos()
    edges = [0, *cutoffs, len(dictionary) - first]
    shown = ",".join(map(str, cutoffs))
    if any(start >= end for start, end in zip(edges, edges[1:])):
        raise UserError(
            f"--cutoffs {shown}: must rise, from 1 to less than the {edges[-1]:,} words of this "
            "vocabulary; choose others, or [] for one softmax over all"
        )
    if cfg.div_val < 1:
        raise UserError(f"--div-val {cfg.div_val}: must be at least 1")
    require_at_least(0, cfg, "embedding_width")
    require_dropouts(cfg, "dropout_projection")
    widest = cfg.embedding_width or cfg.width
    widths = [int(widest // cfg.div_val**i) for i in range(len(edges) - 1)]
    if widths[-1] < 1:
        raise UserError(
            f"--div-val {cfg.div_val}: leaves no width for embeddings of the last of {len(widths)} "
            f"bands, {widest} for the first; lower it or give fewer --cutoffs"
        )
    return Bands(
        width=cfg.width,
        first=first,
        edges=tuple(edges),
        widths=tuple(widths),
        projected=set(widths) != {cfg.width},
        tied_projections=str(cfg.tied_projections),
        biases=cfg.band_biases,
        cluster_space=str(cfg.cluster_space),
        p=cfg.dropout_projection,
    )


class AdaptiveEmbedding(nn.Module):
    """A vector for each token: narrow for rare words, then projected to the common width
    (A. Baevski and M. Auli, arXiv 1809.10853, section 3). ``E_i [rows, e_i]`` of band ``i`` are
    ``weight`` and ``tail_weights``, ``P_i [H, e_i]`` are ``projections``.

    Args:
        bands (Bands)
    """

    def __init__(self, bands):
        super().__init__()
        self.bands = bands
        self.embedding_dim = bands.width
        shapes = list(zip(bands.sizes, bands.widths))
        self.weight = nn.Parameter(torch.empty(shapes[0]))
        self.tail_weights = nn.ParameterList([torch.empty(shape) for shape in shapes[1:]])
        self.projections = nn.ParameterList()
        if bands.projected:
            self.projections.extend([torch.empty(bands.width, e) for e in bands.widths])
        self.register_buffer("edges", torch.tensor(bands.edges[1:-1]), persistent=False)
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.size(1) ** -0.5)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection)

    @property
    def weights(self):
        """``E_i`` of each band."""
        return [self.weight, *self.tail_weights]

    def forward(self, tokens, training=False):
        """Tokens ``[...]`` to ``[..., H]``."""
        rows, _, places = self.bands.locate(tokens.flatten(), self.edges)
        embedded = []
        for i, weight in enumerate(self.weights):
            e = F.embedding(rows[places[i]] - self.bands.edges[i], weight)
            e = dropout(e, self.bands.p, training)
            embedded.append(F.linear(e, self.projections[i]) if self.bands.projected else e)
        order = torch.cat(places).argsort()
        return torch.cat(embedded)[order].unflatten(0, tokens.shape)
