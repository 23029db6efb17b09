"""Transformer-XL: Z. Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length
Context", arXiv 1901.02860."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model
from torch import nn

from fairseq_sha.checks import (
    require_at_least,
    require_dropouts,
    require_heads_that_divide,
)
from fairseq_sha.errors import UserError
from fairseq_sha.models.published_weights import PublishedWeights, num_layers, shape_of
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import FeedForward
from fairseq_sha.ops import attend, causal_relative_bias, dropout, next_memory

STD = 0.02  # of initial weights


@dataclass
class TransformerXLConfig(FairseqDataclass):
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
        default=0, metadata={"help": "width of a head; 0: width / n-head (default: 0)"}
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
            "help": "distances in tokens beyond this one are taken for this one; 0 for none "
            "(default: published script, training)"
        },
    )
    same_length: bool = field(
        default=False,
        metadata={"help": "attend to exactly mem-len tokens, itself included, once there are many"},
    )
    dropout: float = field(
        default=0.1,
        metadata={
            "help": "dropout of embeddings, positions, sublayers and the last output "
            "(default: published script)"
        },
    )
    dropatt: float = field(
        default=0.0,
        metadata={"help": "dropout of attention weights (default: published script)"},
    )


class RelativeAttention(nn.Module):
    """Attention with relative positions (section 3.3): a content and a position part, each with a
    bias ``u`` or ``w`` that does not depend on the query."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.p = cfg.dropatt
        self.same_length = cfg.mem_len if cfg.same_length else None
        heads_width = cfg.n_head * head_width(cfg)
        self.query_key_value = nn.Linear(cfg.width, 3 * heads_width, bias=False)
        self.position = nn.Linear(cfg.width, heads_width, bias=False)
        self.output = nn.Linear(heads_width, cfg.width, bias=False)

    def forward(self, h, memory, positions, u, w):
        """
        Args:
            h (Tensor): ``[T, B, H]``
            memory (Tensor): ``[K - T, B, H]``
            positions (Tensor): embeddings of the distances ``K - 1`` down to -1, ``[K + 1, H]``
            u, w (Tensor): ``[heads, H / heads]``

        Returns:
            Tensor ``[T, B, H]``
        """
        query, key, value = self.query_key_value.weight.chunk(3)
        q = self.heads(F.linear(h, query))
        # Apart, so that no gradient is computed for the memory.
        k, v = (
            self.heads(torch.cat([F.linear(memory, weight), F.linear(h, weight)])).flatten(1, 2)
            for weight in (key, value)
        )
        r = self.heads(self.position(positions))
        position_queries = (q + w).flatten(1, 2) / q.size(-1) ** 0.5
        bias = causal_relative_bias(position_queries, r, self.same_length)
        mix = attend((q + u).flatten(1, 2), k, v, bias, self.p if self.training else 0.0)
        return self.output(mix.reshape(*h.shape[:2], -1))

    def heads(self, x):
        """``[..., H] -> [..., heads, H / heads]``"""
        return x.unflatten(-1, (self.n_head, -1))


class TransformerXLLayer(nn.Module):
    """Attention over memory and segment, and a feed-forward layer, each followed by its norm."""

    def __init__(self, cfg):
        super().__init__()
        self.p = cfg.dropout
        self.mem_len = cfg.mem_len
        self.attention = RelativeAttention(cfg)
        self.norm_attention = nn.LayerNorm(cfg.width)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, cfg.dropout)
        self.norm_feed_forward = nn.LayerNorm(cfg.width)

    def forward(self, h, state, positions, u, w):
        """``h [T, B, H]`` and state to the same; the state holds ``memory``, the last inputs of
        this layer, ``[rows <= mem_len, B, H]``."""
        # Keys and values are computed anew from what the memory holds (section 3.2).
        memory = state["memory"] if state else h[:0]
        left = next_memory(memory, h, self.mem_len)
        attended = self.attention(h, memory, positions, u, w)
        h = self.norm_attention(h + dropout(attended, self.p, self.training))
        wide = dropout(self.feed_forward(h, self.training), self.p, self.training)
        return self.norm_feed_forward(h + wide), {"memory": left}


class TransformerXLDecoder(SegmentDecoder):
    """Scaled embedding, layers that share the biases of their attention, tied output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [TransformerXLLayer(cfg) for _ in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            embedding_scale=cfg.width**0.5,
            dropout_input=cfg.dropout,
            dropout_output=cfg.dropout,
        )
        self.p = cfg.dropout
        self.clamp_len = cfg.clamp_len
        self.content_bias = nn.Parameter(torch.empty(cfg.n_head, head_width(cfg)))
        self.position_bias = nn.Parameter(torch.empty(cfg.n_head, head_width(cfg)))
        for parameter in (self.content_bias, self.position_bias):
            nn.init.normal_(parameter, std=STD)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=STD)
            elif isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def inputs_of_layers(self, h, state):
        remembered = state[0]["memory"].size(0) if state[0] else 0
        positions = self.embed_distances(remembered + len(h), h.device).to(h)
        positions = dropout(positions, self.p, self.training)
        return [(positions, self.content_bias, self.position_bias)] * len(self.layers)

    def embed_distances(self, total, device):
        """Sinusoids of the distances ``total - 1`` down to -1: ``[total + 1, H]``."""
        distances = torch.arange(total - 1, -2, -1, device=device, dtype=torch.float)
        if self.clamp_len > 0:
            distances = distances.clamp(max=self.clamp_len)
        width = self.embedding.embedding_dim
        exponents = torch.arange(0, width, 2, device=device, dtype=torch.float) / width
        angles = distances.unsqueeze(1) * 10000**-exponents
        return torch.cat([angles.sin(), angles.cos()], -1)


def head_width(cfg):
    return cfg.d_head or cfg.width // cfg.n_head


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "n_head", "d_inner")
    require_at_least(0, cfg, "mem_len", "clamp_len", "d_head")
    if cfg.same_length:
        require_at_least(1, cfg, "mem_len")
    if not cfg.d_head:
        require_heads_that_divide(cfg)
    if cfg.width % 2:
        raise UserError(f"--width {cfg.width}: must be even, half for sines, half for cosines")
    require_dropouts(cfg, "dropout", "dropatt")


@register_model("transformer_xl", dataclass=TransformerXLConfig)
class TransformerXL(SegmentLanguageModel):
    """The model family; the named architectures differ from it in their defaults only."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(TransformerXLDecoder(cfg, task.source_dictionary))


@dataclass
class TransformerXLEnwik8Layers12Config(TransformerXLConfig):
    pass


@register_model("transformer_xl_enwik8_12l", dataclass=TransformerXLEnwik8Layers12Config)
class TransformerXLEnwik8Layers12(TransformerXL):
    """The paper's 41M parameters."""


@dataclass
class TransformerXLEnwik8Layers18Config(TransformerXLConfig):
    # The paper gives depth and number of parameters (88M); widths are chosen here to match.
    num_layers: int = field(default=18, metadata={"help": "number of layers (default: paper)"})
    width: int = field(
        default=640,
        metadata={"help": "width H of embedding and layers (default: chosen here, for 88M)"},
    )
    d_inner: int = field(
        default=2208,
        metadata={"help": "inner width of feed-forward layers (default: chosen here, for 88M)"},
    )
    mem_len: int = field(
        default=784,
        metadata={"help": "tokens before the segment that are attended to (default: paper)"},
    )
    dropout: float = field(
        default=0.15,
        metadata={
            "help": "dropout of embeddings, positions, sublayers and the last output "
            "(default: as with 24 layers)"
        },
    )
    dropatt: float = field(
        default=0.15,
        metadata={"help": "dropout of attention weights (default: as with 24 layers)"},
    )


@register_model("transformer_xl_enwik8_18l", dataclass=TransformerXLEnwik8Layers18Config)
class TransformerXLEnwik8Layers18(TransformerXL):
    """Of the size of the paper's 88M parameters; its widths were not published."""


@dataclass
class TransformerXLEnwik8Layers24Config(TransformerXLConfig):
    num_layers: int = field(default=24, metadata={"help": "number of layers (default: paper)"})
    width: int = field(
        default=1024,
        metadata={"help": "width H of embedding and layers (default: published script)"},
    )
    d_inner: int = field(
        default=3072,
        metadata={"help": "inner width of feed-forward layers (default: published script)"},
    )
    mem_len: int = field(
        default=768,
        metadata={
            "help": "tokens before the segment that are attended to; may differ at evaluation "
            "(default: published script, training)"
        },
    )
    dropout: float = field(
        default=0.15,
        metadata={
            "help": "dropout of embeddings, positions, sublayers and the last output "
            "(default: published script)"
        },
    )
    dropatt: float = field(
        default=0.15,
        metadata={"help": "dropout of attention weights (default: published script)"},
    )


@register_model("transformer_xl_enwik8_24l", dataclass=TransformerXLEnwik8Layers24Config)
class TransformerXLEnwik8Layers24(TransformerXL):
    """The paper's 277M parameters."""


def _sizes(weights):
    tied = "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"
    _, width = shape_of(weights, tied[tied[1] in weights and tied[0] not in weights], 2)
    n_head, d_head = shape_of(weights, "r_w_bias", 2)
    return {
        "width": width,
        "num_layers": num_layers(weights, "layers"),
        "n_head": n_head,
        "d_head": 0 if n_head * d_head == width else d_head,
        "d_inner": shape_of(weights, "layers.0.pos_ff.CoreNet.0.weight", 2)[0],
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
        "word_emb.emb_layers.0.weight": "embedding.weight",
        "crit.out_layers.0.weight": "embedding.weight",
        "crit.out_layers.0.bias": "output_bias",
        "r_w_bias": "content_bias",
        "r_r_bias": "position_bias",
    },
    layer_names={
        "dec_attn.qkv_net": "attention.query_key_value",
        "dec_attn.r_net": "attention.position",
        "dec_attn.o_net": "attention.output",
        "dec_attn.layer_norm": "norm_attention",
        "pos_ff.CoreNet.0": "feed_forward.linear1",
        "pos_ff.CoreNet.3": "feed_forward.linear2",
        "pos_ff.layer_norm": "norm_feed_forward",
    },
    vocabulary=("embedding.weight", "output_bias"),
    settings=("n_head", "mem_len", "clamp_len", "same_length"),
    sizes=_sizes,
    constant=_constant,
)
