"""Transformer-XL: Z. Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length
Context", arXiv 1901.02860."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts
from fairseq_sha.errors import UserError
from fairseq_sha.models.embeddings import AdaptiveConfig, bands
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.published_weights import (
    ADAPTIVE_SETTINGS,
    PublishedWeights,
    Setting,
    adaptive_names,
    adaptive_sizes,
    num_layers,
    same_settings,
    shape_of,
)
from fairseq_sha.models.segment_decoder import Context, SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import FeedForward
from fairseq_sha.ops import (
    attend,
    causal_relative_bias,
    dropout,
    next_keys_and_values,
    next_memory,
    remembers_inputs,
)

STD = 0.02  # of initial weights


@dataclass
class TransformerXLConfig(AdaptiveConfig):
    width: int = field(
        default=512,
        metadata={"help": "width H of embedding and layers (default: paper, 12 layers on enwik8)"},
    )
    num_layers: int = field(
        default=12, metadata={"help": "number of layers (default: paper, 12 layers on enwik8)"}
    )
    n_head: int = field(
        default=8, metadata={"help": "heads of each layer (default: author's published script)"}
    )
    d_head: int = field(
        default=0,
        metadata={"help": "width of each head; 0 for width / n-head (default: published script)"},
    )
    d_inner: int = field(
        default=2048,
        metadata={"help": "inner width of feed-forward layers (default: published script)"},
    )
    mem_len: int = field(
        default=512,
        metadata={
            "help": "tokens before the segment that are attended to; may differ at evaluation "
            "(default: published script, training)"
        },
    )
    clamp_len: int = field(
        default=0,
        metadata={
            "help": "distances in tokens beyond this one count as this one; 0 for no limit "
            "(default: published script, training)"
        },
    )
    same_length: bool = field(
        default=False,
        metadata={
            "help": "let each position attend to mem-len tokens, including itself, wherever it is "
            "in its segment (default: published script, training)"
        },
    )
    untie_r: bool = field(
        default=False,
        metadata={
            "help": "let each layer have its own biases u and v of attention, as the published "
            "TensorFlow weights do (default: shared by all layers, as in the paper)"
        },
    )
    dropout: float = field(
        default=0.1,
        metadata={
            "help": "dropout of embeddings, positions, sublayers, the last output, and inside "
            "feed-forward layers (default: published script)"
        },
    )
    dropatt: float = field(
        default=0.0,
        metadata={"help": "dropout of attention weights (default: published script)"},
    )


@dataclass(frozen=True)
class TransformerXLContext(Context):
    """What all layers share."""

    #: Embeddings ``R`` of the distances ``K - 1`` down to -1, ``[K + 1, H]``.
    positions: torch.Tensor = None
    #: The biases ``u`` on content and ``v`` on positions, ``[heads, d]``; None if layers have their
    #: own.
    u: torch.Tensor = None
    v: torch.Tensor = None


class RelativeAttention(nn.Module):
    """Attention with relative positions (section 3.3). A score is the sum of four terms::

    (W_q h_i + u) W_kE h_j + (W_q h_i + v) W_kR R_(i-j)
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.p = cfg.dropatt
        self.mem_len = cfg.mem_len
        self.same_length = cfg.mem_len if cfg.same_length else None
        inner = cfg.n_head * head_width(cfg)
        self.query_key_value = nn.Linear(cfg.width, 3 * inner, bias=False)
        self.position = nn.Linear(cfg.width, inner, bias=False)
        self.output = nn.Linear(inner, cfg.width, bias=False)
        if cfg.untie_r:
            self.content_bias, self.position_bias = new_biases(cfg)

    def forward(self, h, state, context):
        """
        Args:
            h (Tensor): ``[T, B, H]``
            state (dict): see :class:`TransformerXLLayer`
            context (TransformerXLContext)

        Returns:
            Tensor ``[T, B, H]``
            dict: the state of the next segment
        """
        u, v = context.u, context.v
        if u is None:
            u, v = self.content_bias, self.position_bias
        query, *key_and_value = self.query_key_value.weight.chunk(3)
        q = self.heads(F.linear(h, query))
        keys, values, new_state = self.remember(h, state, key_and_value, context.training)
        keys, values = (self.heads(rows).flatten(1, 2) for rows in (keys, values))
        position_queries, r = self.project_positions((q + v) / q.size(-1) ** 0.5, context.positions)
        bias = causal_relative_bias(position_queries.flatten(1, 2), r, self.same_length)
        p = self.p if context.training else 0.0
        mix = attend((q + u).flatten(1, 2), keys, values, bias, p)
        return self.output(mix.unflatten(1, (-1, self.n_head)).flatten(2)), new_state

    def remember(self, h, state, weights, training):
        """Keys and values of memory and segment, ``[K, B, heads * d]``, and the next state."""
        if remembers_inputs(state, training):
            memory = state["memory"] if state else h[:0]
            # Projected apart from the segment, the memory costs no gradient.
            keys, values = (
                torch.cat([F.linear(memory, weight), F.linear(h, weight)]) for weight in weights
            )
            return keys, values, {"memory": next_memory(memory, h, self.mem_len)}
        own = [F.linear(h, weight) for weight in weights]
        remembered, new_state = next_keys_and_values(state, own, self.mem_len)
        keys, values = (torch.cat(rows) for rows in zip(remembered, own))
        return keys, values, new_state

    def project_positions(self, queries, positions):
        """Two tensors whose products are those of the queries ``[T, B, heads, d]`` and ``W_kR R``,
        for the embeddings ``R`` of distances ``[K + 1, H]``: queries ``[T, B, heads, d or H]`` and
        positions ``[K + 1, heads or 1, d or H]``."""
        if len(queries) > 1:
            return queries, self.heads(self.position(positions))
        # In generation there are far fewer queries than distances, so these are projected instead.
        weight = self.position.weight.unflatten(0, (self.n_head, -1))
        return torch.einsum("tbnd,ndh->tbnh", queries, weight), positions.unsqueeze(1)

    def heads(self, x):
        """``[..., heads * d] -> [..., heads, d]``"""
        return x.unflatten(-1, (self.n_head, -1))


class TransformerXLLayer(nn.Module):
    """Attention over memory and segment, and a feed-forward layer, each followed by its norm."""

    def __init__(self, cfg):
        super().__init__()
        self.p = cfg.dropout
        self.attention = RelativeAttention(cfg)
        self.norm_attention = nn.LayerNorm(cfg.width)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, cfg.dropout)
        self.norm_feed_forward = nn.LayerNorm(cfg.width)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds ``memory``, the last inputs of
        this layer, ``[rows <= mem_len, B, H]``, from which keys and values are recomputed (section
        3.2); in evaluation without gradients ``keys`` and ``values`` themselves, ``[rows, B,
        heads * d]``."""
        attended, new_state = self.attention(h, state, context)
        h = self.norm_attention(h + dropout(attended, self.p, context.training))
        wide = self.feed_forward(h, context.training)
        h = self.norm_feed_forward(h + dropout(wide, self.p, context.training))
        return h, new_state


class TransformerXLDecoder(SegmentDecoder):
    """Scaled embedding, layers that share the biases of their attention (unless ``untie_r``), tied
    output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [TransformerXLLayer(cfg) for _ in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            bands=bands(cfg, dictionary),
            embedding_scale=cfg.width**0.5,
            dropout_input=cfg.dropout,
            dropout_output=cfg.dropout,
        )
        self.p = cfg.dropout
        self.clamp_len = cfg.clamp_len
        self.content_bias, self.position_bias = (None, None) if cfg.untie_r else new_biases(cfg)
        for name, parameter in self.vocabulary_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.01 if "projections" in name else STD)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
            elif isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def prepare(self, h, state, context):
        # Memory, keys and values have as many rows.
        remembered = next(iter(state[0].values())).size(0) if state[0] else 0
        positions = self.embed_distances(remembered + len(h), h.device).to(h)
        return TransformerXLContext(
            **vars(context),
            positions=dropout(positions, self.p, context.training),
            u=self.content_bias,
            v=self.position_bias,
        )

    def embed_distances(self, total, device):
        """Sinusoids of the distances ``total - 1`` down to -1: ``[total + 1, H]``."""
        distances = torch.arange(total - 1, -2, -1, device=device, dtype=torch.float)
        if self.clamp_len > 0:
            distances = distances.clamp(max=self.clamp_len)
        width = self.embedding.embedding_dim
        exponents = torch.arange(0, width, 2, device=device, dtype=torch.float) / width
        angles = distances.unsqueeze(1) * 10000**-exponents
        return torch.cat([angles.sin(), angles.cos()], -1)


def new_biases(cfg):
    """``u`` and ``v``, ``[heads, d]``."""
    return [nn.Parameter(STD * torch.randn(cfg.n_head, head_width(cfg))) for _ in range(2)]


def head_width(cfg):
    """``d``, the width of a head."""
    return cfg.d_head or cfg.width // cfg.n_head


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "n_head", "d_inner")
    require_at_least(0, cfg, "d_head", "mem_len", "clamp_len")
    if cfg.same_length:
        require_at_least(1, cfg, "mem_len")
    if not cfg.d_head and cfg.width % cfg.n_head:
        raise UserError(
            f"--n-head {cfg.n_head}: does not divide --width {cfg.width}; choose another, or give "
            "--d-head"
        )
    if cfg.width % 2:
        raise UserError(f"--width {cfg.width}: must be even, half for sines, half for cosines")
    require_dropouts(cfg, "dropout", "dropatt")


#: Names of embeddings, their projections, the head's layers and theirs, before the band's number.
ADAPTIVE_NAMES = "word_emb.emb_layers", "word_emb.emb_projs", "crit.out_layers", "crit.out_projs"


def _prepare(weights, settings):
    """Bring weights into our layout: biases that each layer has for itself by layer; an adaptive
    softmax with one table a band even if all are equally wide, and the clusters in the order of the
    bands, which the published code has reversed."""
    prepared = dict(weights)
    for name in ("r_w_bias", "r_r_bias"):
        if name in weights and weights[name].dim() == 3:
            for i, bias in enumerate(prepared.pop(name)):
                prepared[f"layers.{i}.{name}"] = bias
    if "crit.cluster_weight" not in weights:
        return prepared
    bands = shape_of(weights, "crit.cluster_weight", 2)[0] + 1
    for name, dimensions in (("crit.cluster_weight", 2), ("crit.cluster_bias", 1)):
        shape_of(weights, name, dimensions)
        prepared[name] = weights[name].flip(0)
    tables, _, layers, _ = ADAPTIVE_NAMES
    for prefix, end, dimensions in (
        (tables, "weight", 2),
        (layers, "weight", 2),
        (layers, "bias", 1),
    ):
        name = f"{prefix}.{{}}.{end}"
        if name.format(0) not in weights or name.format(1) in weights:
            continue
        shape_of(weights, name.format(0), dimensions)
        table = prepared.pop(name.format(0))
        cutoffs = list(settings.get("cutoffs", []))
        edges = [0, *cutoffs, len(table)]
        if len(cutoffs) != bands - 1 or any(i >= j for i, j in zip(edges, edges[1:])):
            raise UserError(
                f"{name.format(0)!r} holds {bands} bands of {len(table):,} words; give the "
                f"{bands - 1} numbers of words before each but the first with --set cutoffs=..., "
                "such as 20000,40000,200000"
            )
        for i, band in enumerate(table.tensor_split(cutoffs)):
            prepared[name.format(i)] = band
    return prepared


def _sizes(weights):
    untied = "layers.0.r_w_bias" in weights
    n_head, d_head = shape_of(weights, "layers.0.r_w_bias" if untied else "r_w_bias", 2)
    width = shape_of(weights, "layers.0.dec_attn.o_net.weight", 2)[0]
    return {
        "width": width,
        "num_layers": num_layers(weights, "layers"),
        "n_head": n_head,
        "d_head": d_head,
        "untie_r": untied,
        "d_inner": shape_of(weights, "layers.0.pos_ff.CoreNet.0.weight", 2)[0],
        **adaptive_sizes(weights, width, "tails", ADAPTIVE_NAMES),
    }


def _constant(name, weights):
    """The frequencies of the position embeddings are saved, but not trained."""
    if name != "pos_emb.inv_freq":
        return None
    width = _sizes(weights)["width"]
    return 10000 ** -(torch.arange(0, width, 2, dtype=torch.float) / width)


#: Weights of the published code, github.com/kimiyoung/transformer-xl (PyTorch).
PUBLISHED = PublishedWeights(
    layer_prefix="layers",
    whole_names={
        **adaptive_names(*ADAPTIVE_NAMES),
        "crit.cluster_weight": "head.cluster_weight",
        "crit.cluster_bias": "head.cluster_bias",
        "r_w_bias": "content_bias",
        "r_r_bias": "position_bias",
    },
    layer_names={
        "dec_attn.qkv_net": "attention.query_key_value",
        "dec_attn.r_net": "attention.position",
        "dec_attn.o_net": "attention.output",
        "dec_attn.layer_norm": "norm_attention",
        "r_w_bias": "attention.content_bias",
        "r_r_bias": "attention.position_bias",
        "pos_ff.CoreNet.0": "feed_forward.linear1",
        "pos_ff.CoreNet.3": "feed_forward.linear2",
        "pos_ff.layer_norm": "norm_feed_forward",
    },
    vocabulary=("embedding.weight", "head.bias"),
    settings={
        **same_settings("n_head", "mem_len", "same_length", "d_head", "untie_r"),
        "clamp_len": Setting("clamp_len", lambda value, sizes: 0 if value == -1 else value),
        **ADAPTIVE_SETTINGS,
    },
    sizes=_sizes,
    constant=_constant,
    prepare=_prepare,
)

ARCHITECTURES = {
    # The paper's 41M parameters.
    "transformer_xl_enwik8_12l": {},
    # The paper gives the depth and the number of parameters, 88M; the widths are chosen to match.
    "transformer_xl_enwik8_18l": {
        "num_layers": Size(18, "paper"),
        "width": Size(640, "chosen here, for 88M"),
        "d_inner": Size(2208, "chosen here, for 88M"),
        "mem_len": Size(784, "paper"),
        "dropout": Size(0.15, "as with 24 layers"),
        "dropatt": Size(0.15, "as with 24 layers"),
    },
    # The paper's 277M parameters.
    "transformer_xl_enwik8_24l": {
        "num_layers": Size(24, "paper"),
        "width": Size(1024, "published script"),
        "d_inner": Size(3072, "published script"),
        "mem_len": Size(768, "published script, training"),
        "dropout": Size(0.15, "published script"),
        "dropatt": Size(0.15, "published script"),
    },
    # The paper's 151M parameters, with the 267,735 words of WikiText-103.
    "transformer_xl_wt103": {
        "cutoffs": Size([20000, 40000, 200000], "published script, WikiText-103"),
        "num_layers": Size(16, "published script, WikiText-103"),
        "width": Size(410, "published script, WikiText-103"),
        "n_head": Size(10, "published script, WikiText-103"),
        "d_inner": Size(2100, "published script, WikiText-103"),
        "mem_len": Size(150, "published script, WikiText-103, training"),
    },
    # The published script makes 285M parameters; the paper says 257M.
    "transformer_xl_wt103_large": {
        "cutoffs": Size([20000, 40000, 200000], "published script, WikiText-103"),
        "div_val": Size(4.0, "published script, WikiText-103, large"),
        "tied_projections": Size("tails", "published script, WikiText-103"),
        "num_layers": Size(18, "published script, WikiText-103, large"),
        "width": Size(1024, "published script, WikiText-103, large"),
        "n_head": Size(16, "published script, WikiText-103, large"),
        "d_inner": Size(4096, "published script, WikiText-103, large"),
        "mem_len": Size(384, "published script, WikiText-103, large, training"),
        "dropout": Size(0.2, "published script, WikiText-103, large"),
        "dropatt": Size(0.2, "published script, WikiText-103, large"),
    },
}

TINY = Tiny(
    model={"width": 16, "num_layers": 2, "n_head": 2, "d_inner": 32, "mem_len": 60, "dropout": 0.1},
    training="--optimizer adam --lr 0.01 --lr-scheduler cosine --clip-norm 0.25",
    variants={
        "": {"mem_len": 9},
        "same_length": {"mem_len": 9, "same_length": True, "d_head": 6, "untie_r": True},
        "adaptive": {
            "mem_len": 9,
            "cutoffs": [7, 15],
            "div_val": 4.0,
            "tied_projections": "tails",
        },
    },
)


@register_family("transformer_xl", TransformerXLConfig, ARCHITECTURES, TINY, PUBLISHED)
class TransformerXL(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(TransformerXLDecoder(cfg, task.source_dictionary))
