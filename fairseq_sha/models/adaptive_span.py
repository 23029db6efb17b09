"""Adaptive Span: S. Sukhbaatar et al., "Adaptive Attention Span in Transformers",
arXiv 1905.07799."""

import math
from dataclasses import dataclass, field
from typing import Tuple

import torch
from fairseq.dataclass import FairseqDataclass
from torch import nn

from fairseq_sha.checks import (
    require_at_least,
    require_dropouts,
    require_heads_that_divide,
)
from fairseq_sha.errors import UserError
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.published_weights import (
    PublishedWeights,
    num_layers,
    same_settings,
    shape_of,
)
from fairseq_sha.models.segment_decoder import Context, SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import FeedForward
from fairseq_sha.ops import (
    dropout,
    masked_softmax,
    next_keys_and_values,
    next_memory,
    remembers_inputs,
    skew,
)

TRIM_TO_MULTIPLES_OF = 64


@dataclass
class AdaptiveSpanConfig(FairseqDataclass):
    width: int = field(
        default=512, metadata={"help": "width H of embedding and layers (default: paper, enwik8)"}
    )
    num_layers: int = field(
        default=12, metadata={"help": "number of layers (default: paper, enwik8)"}
    )
    n_head: int = field(
        default=8, metadata={"help": "heads of each layer (default: paper, enwik8)"}
    )
    d_inner: int = field(
        default=2048,
        metadata={"help": "inner width of feed-forward layers (default: paper, enwik8)"},
    )
    attn_span: int = field(
        default=8192,
        metadata={"help": "longest possible span, in tokens (default: paper, enwik8)"},
    )
    adapt_span_ramp: int = field(
        default=32,
        metadata={"help": "length in tokens of a span's soft end (default: paper, R)"},
    )
    adapt_span_loss: float = field(
        default=5e-7,
        metadata={
            "help": "weight of the mean span in tokens, of each layer, in the training loss in "
            "nats (default: published script)"
        },
    )
    adapt_span_init: float = field(
        default=0.0,
        metadata={
            "help": "initial span as a share of attn-span, 0 to 1 (default: published script)"
        },
    )
    dropout: float = field(
        default=0.3,
        metadata={
            "help": "dropout of attention weights and inside feed-forward layers "
            "(default: published script)"
        },
    )


@dataclass(frozen=True)
class AdaptiveSpanContext(Context):
    """What all layers share."""

    #: Embeddings of the ``L = attn_span`` positions before a query, ``[d, L]``.
    key_positions: torch.Tensor = None
    #: For each layer, how many of the oldest keys no head reaches.
    trimmed: Tuple[int, ...] = ()


class AdaptiveAttention(nn.Module):
    """Each position attends to the positions before it, not to itself. Each head learns how far
    it attends (section 2.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.attn_span = cfg.attn_span
        self.ramp = cfg.adapt_span_ramp
        self.p = cfg.dropout
        self.query = nn.Linear(cfg.width, cfg.width, bias=False)
        self.key = nn.Linear(cfg.width, cfg.width, bias=False)
        self.value = nn.Linear(cfg.width, cfg.width, bias=False)
        self.output = nn.Linear(cfg.width, cfg.width, bias=False)
        # z of the paper, as a share of attn_span.
        self.span = nn.Parameter(torch.full((cfg.n_head,), float(cfg.adapt_span_init)))

    def keys_and_values(self, inputs):
        """Of inputs ``[M, B, H]`` of this layer: two tensors ``[M, B, H]``."""
        return self.key(inputs), self.value(inputs)

    def forward(self, h, own, remembered, key_positions, trimmed, training):
        """
        Args:
            h (Tensor): ``[T, B, H]``
            own (pair of Tensor): keys and values of ``h``, ``[T, B, H]``
            remembered (pair of Tensor): keys and values of the tokens before that some head
                reaches, ``[L - trimmed, B, H]``
            key_positions (Tensor): embeddings of the L positions before a query, ``[d, L]``
            trimmed (int): how many of the oldest keys no head reaches, see :meth:`trim`
            training (bool): whether to apply dropout

        Returns:
            Tensor ``[T, B, H]``
        """
        # No query of this segment attends to the last token.
        k, v = (torch.cat([old, new[:-1]]) for old, new in zip(remembered, own))
        q, k, v = (
            x.unflatten(-1, (self.n_head, -1)).flatten(1, 2).transpose(0, 1)
            for x in (self.query(h), k, v)
        )
        q = q / q.size(-1) ** 0.5
        from_positions = torch.matmul(q, key_positions[:, trimmed:])
        scores = torch.baddbmm(skew(from_positions, float("-inf")), q, k.transpose(1, 2))
        mask = skew(self.mask(trimmed).unsqueeze(1).expand(-1, len(h), -1), 0.0)
        weights = masked_softmax(scores.unflatten(0, (-1, self.n_head)), mask).flatten(0, 1)
        mix = torch.bmm(dropout(weights, self.p, training), v)
        return self.output(mix.transpose(0, 1).reshape(h.shape))

    def trim(self, longest):
        """How many of the oldest keys no head reaches, given the longest of the heads' spans as a
        share of attn_span."""
        reached = math.ceil(longest * self.attn_span) + self.ramp
        unreached = self.attn_span - min(self.attn_span, reached)
        multiples = min(self.attn_span - 1, unreached) // TRIM_TO_MULTIPLES_OF
        return multiples * TRIM_TO_MULTIPLES_OF

    def mask(self, trimmed):
        """The soft mask of each head on the keys before a query: ``[heads, L - trimmed]``"""
        distances = torch.arange(trimmed, self.attn_span, device=self.span.device)
        # In float32: a half-precision number of thousands of tokens is too coarse for the ramp.
        spans = self.span.float().unsqueeze(1) * self.attn_span
        reach = distances - (self.attn_span - 1) + spans
        return (reach / self.ramp + 1).clamp(0, 1)


class AdaptiveSpanLayer(nn.Module):
    """Attention over the positions before, and a feed-forward layer, each followed by its norm."""

    def __init__(self, cfg, index):
        super().__init__()
        self.index = index
        self.attn_span = cfg.attn_span
        self.attention = AdaptiveAttention(cfg)
        self.norm_attention = nn.LayerNorm(cfg.width)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, cfg.dropout)
        self.norm_feed_forward = nn.LayerNorm(cfg.width)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds ``cache``, the last inputs of
        this layer, ``[attn_span, B, H]``; in evaluation without gradients ``keys`` and
        ``values`` of those that some head reaches, ``[attn_span - trimmed, B, H]``."""
        trimmed, training = context.trimmed[self.index], context.training
        reached = self.attn_span - trimmed
        own = self.attention.keys_and_values(h)
        # Before the first token there are zeros, which are attended to like any other row.
        if remembers_inputs(state, training):
            # A span may grow, and reach further the next time.
            cache = state["cache"] if state else h.new_zeros(self.attn_span, *h.shape[1:])
            new_state = {"cache": next_memory(cache, h, self.attn_span)}
            # Projected apart from the segment, the cache costs no gradient.
            remembered = self.attention.keys_and_values(cache[trimmed:])
        else:
            if not state:
                zeros = own[0].new_zeros(reached, *h.shape[1:])
                state = {"keys": zeros, "values": zeros}
            remembered, new_state = next_keys_and_values(state, own, reached)
        attended = self.attention(h, own, remembered, context.key_positions, trimmed, training)
        h = self.norm_attention(h + attended)
        return self.norm_feed_forward(h + self.feed_forward(h, training)), new_state


class AdaptiveSpanDecoder(SegmentDecoder):
    """Embedding, layers that share the embeddings of key positions, untied output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [AdaptiveSpanLayer(cfg, i) for i in range(cfg.num_layers)]
        super().__init__(dictionary, layers, cfg.width, tied=False)
        self.span_loss = cfg.adapt_span_loss
        self.has_auxiliary_losses = cfg.adapt_span_loss > 0
        self.attn_span = cfg.attn_span
        self.trimmed_when_exported = None
        self.key_positions = nn.Parameter(torch.randn(cfg.width // cfg.n_head, cfg.attn_span))

    def prepare(self, h, state, context):
        trimmed = self.trimmed_when_exported or self.trimmed()
        return AdaptiveSpanContext(
            **vars(context), key_positions=self.key_positions, trimmed=tuple(trimmed)
        )

    def trimmed(self):
        """For each layer, how many of the oldest keys no head reaches: a list of int."""
        # All layers at once, since each reading makes the CPU wait for the GPU.
        longest = self.spans().detach().amax(1).tolist()
        return [layer.attention.trim(span) for layer, span in zip(self.layers, longest)]

    def prepare_for_onnx_export_(self):
        """fairseq's hook. An exported graph cannot depend on the values of tensors."""
        super().prepare_for_onnx_export_()
        self.trimmed_when_exported = self.trimmed()

    def spans(self):
        """The span of each layer's heads as a share of attn_span: ``[layers, heads]``."""
        return torch.stack([layer.attention.span for layer in self.layers])

    def auxiliary_losses(self, done, targets, further_targets=None):
        """The loss that keeps spans short (section 2.2)."""
        spans = self.spans().float() * self.attn_span
        return {"span_loss": self.span_loss * spans.mean(1).sum()}

    def statistics(self):
        """The mean and the longest span, in tokens."""
        spans = self.spans().detach().float() * self.attn_span
        return {"span_mean": spans.mean(), "span_max": spans.max()}

    def bounded_parameters(self):
        return [(layer.attention.span, 0.0, 1.0) for layer in self.layers]


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    sizes = ("width", "num_layers", "n_head", "d_inner", "attn_span", "adapt_span_ramp")
    require_at_least(1, cfg, *sizes)
    require_at_least(0, cfg, "adapt_span_loss", "adapt_span_init")
    if cfg.adapt_span_init > 1:
        raise UserError(f"--adapt-span-init {cfg.adapt_span_init}: must be at most 1")
    require_heads_that_divide(cfg)
    require_dropouts(cfg, "dropout")


def _sizes(weights):
    spans = "layers.0.attn.attn.adaptive_span._mask.current_val"
    return {
        "width": shape_of(weights, "in_emb.weight", 2)[1],
        "num_layers": num_layers(weights, "layers"),
        "n_head": shape_of(weights, spans, 3)[0],
        "d_inner": shape_of(weights, "layers.0.ff.fc1.weight", 2)[0],
        "attn_span": shape_of(weights, "key_pe", 3)[2],
    }


def _constant(name, weights):
    """The distances that masks are computed from are saved, but not trained."""
    if not name.endswith("adaptive_span._mask.mask_template"):
        return None
    return torch.arange(1.0 - weights[name].numel(), 1.0)


#: Weights of the published code, github.com/facebookresearch/adaptive-span.
PUBLISHED = PublishedWeights(
    layer_prefix="layers",
    whole_names={
        "key_pe": "key_positions",
        "in_emb.weight": "embedding.weight",
        "out_emb.weight": "head.weight",
        "out_emb.bias": "head.bias",
    },
    layer_names={
        "attn.attn.adaptive_span._mask.current_val": "attention.span",
        "attn.proj_query": "attention.query",
        "attn.proj_key": "attention.key",
        "attn.proj_val": "attention.value",
        "attn.proj_out": "attention.output",
        "ff.fc1": "feed_forward.linear1",
        "ff.fc2": "feed_forward.linear2",
        "norm1": "norm_attention",
        "norm2": "norm_feed_forward",
    },
    vocabulary=("embedding.weight", "head.weight", "head.bias"),
    settings=same_settings("n_head", "attn_span", "adapt_span_ramp"),
    sizes=_sizes,
    constant=_constant,
    singletons=r"^key_pe$|\.current_val$",
)

ARCHITECTURES = {
    # The paper's 12 layers, 39M parameters.
    "adaptive_span_enwik8": {},
    # The published script's small model.
    "adaptive_span_enwik8_small": {
        "width": Size(256, "published script"),
        "num_layers": Size(8, "published script"),
        "n_head": Size(4, "published script"),
        "d_inner": Size(1024, "published script"),
        "attn_span": Size(1024, "published script"),
        "adapt_span_loss": Size(2e-6, "published script"),
        "dropout": Size(0.0, "published script"),
    },
    # The paper's 24 layers, 209M parameters.
    "adaptive_span_enwik8_large": {
        "width": Size(768, "paper"),
        "num_layers": Size(24, "paper"),
        "d_inner": Size(4096, "paper"),
        "dropout": Size(0.4, "paper"),
    },
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "n_head": 2,
        "d_inner": 32,
        "attn_span": 100,
        "adapt_span_ramp": 8,
        "adapt_span_init": 0.0,
        "adapt_span_loss": 0.01,
        "dropout": 0.1,
    },
    training="--optimizer clipped_adagrad --lr 0.07 --warmup-updates 5 "
    "--criterion cross_entropy_with_auxiliary_losses",
    variants={"": {"attn_span": 9}},
)


@register_family("adaptive_span", AdaptiveSpanConfig, ARCHITECTURES, TINY, PUBLISHED)
class AdaptiveSpan(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(AdaptiveSpanDecoder(cfg, task.source_dictionary))
