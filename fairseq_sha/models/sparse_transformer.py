"""The Sparse Transformer: R. Child et al., "Generating Long Sequences with Sparse Transformers",
arXiv 1904.10509.

A causal Transformer for long texts. A position attends to some of the positions before it, so that
the cost of attention grows with ``T sqrt(T)``. Any position reaches any other one before it by two
steps. There is no memory: it is trained on segments of one window, each on its own. The published
scores are of windows of 12,288 bytes of which only the last ones count: with ``--tokens-per-sample
12288 --context-window 12160``, each byte has at least 12,160 before it.

The model that gave 0.99 on enwik8 was not published. Its authors' later code
(github.com/openai/distribution_augmentation) has the same blocks. It begins a window with a vector
of its own instead of the byte before the first one.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_heads_that_divide
from fairseq_sha.errors import UserError
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.segment_decoder import SegmentLanguageModel
from fairseq_sha.models.window_decoder import WindowDecoder, check_window, extend
from fairseq_sha.modules import FeedForward
from fairseq_sha.modules.boom import gelu
from fairseq_sha.ops import (
    attend_fixed,
    attend_locally,
    attend_strided,
    attend_to_all,
    dropout,
)

PATTERNS = ChoiceEnum(["fixed", "strided", "dense"])


@dataclass
class SparseTransformerConfig(FairseqDataclass):
    width: int = field(
        default=512, metadata={"help": "width H of embedding and layers (default: paper, enwik8)"}
    )
    num_layers: int = field(
        default=30, metadata={"help": "number of layers (default: paper, enwik8)"}
    )
    n_head: int = field(
        default=8, metadata={"help": "heads of each layer (default: paper, enwik8)"}
    )
    d_inner: int = field(
        default=2048, metadata={"help": "inner width of feed-forward layers (default: paper, 4 H)"}
    )
    window: int = field(
        default=12288,
        metadata={
            "help": "tokens that are read at once, each with its position (default: paper, enwik8)"
        },
    )
    eval_stride: int = field(
        default=6144,
        metadata={
            "help": "in validation and generation: tokens by which the window moves when it is "
            "full (default: the least context in the paper)"
        },
    )
    pattern: PATTERNS = field(
        default="fixed",
        metadata={
            "help": "what a position attends to. fixed: its block, and the summary of each block "
            "before; strided: in odd layers the last positions, as many as a block has, in even "
            "ones each position whose distance is a multiple of that; dense: all "
            "(default: paper, enwik8)"
        },
    )
    stride: int = field(
        default=128, metadata={"help": "tokens of a block, l (default: paper, enwik8)"}
    )
    summary: int = field(
        default=32,
        metadata={
            "help": "fixed: positions of each block that all later ones see, c "
            "(default: paper, enwik8)"
        },
    )
    num_summaries: int = field(
        default=4,
        metadata={
            "help": "fixed: parts of a block that are summaries, for different heads in turn: the "
            "paper found more than 1 better, but does not say which gave its score "
            "(default: authors' code)"
        },
    )
    initial_weights: ChoiceEnum(["paper", "code"]) = field(
        default="paper",
        metadata={
            "help": "deviations of initial weights: 0.125 / sqrt(n) with an output matrix of "
            "zeros, or sqrt(0.125 / n) as in the authors' later code (default: paper)"
        },
    )
    dropout: float = field(
        default=0.4,
        metadata={
            "help": "dropout of the outputs of attention and feed-forward layers "
            "(default: paper, enwik8)"
        },
    )


class SparseAttention(nn.Module):
    """Attention to what the pattern allows (section 4)."""

    def __init__(self, cfg, index):
        super().__init__()
        self.n_head = cfg.n_head
        self.query, self.key, self.value, self.output = (
            nn.Linear(cfg.width, cfg.width) for _ in range(4)
        )
        attend = {
            "fixed": partial(attend_fixed, summary=cfg.summary, num_summaries=cfg.num_summaries),
            "strided": attend_strided if index % 2 else attend_locally,
            "dense": attend_to_all,
        }[str(cfg.pattern)]
        self.attend = partial(attend, stride=cfg.stride)

    def forward(self, h, state, training):
        """``h [T, B, H]`` and the state of the window to the same."""
        k, v, new_state = extend(state, self.key(h), self.value(h), training)
        q, k, v = (x.unflatten(-1, (self.n_head, -1)) for x in (self.query(h), k, v))
        return self.output(self.attend(q, k, v).flatten(2)), new_state


class GridPositions(nn.Module):
    """Embeddings of the rows and the columns of a window that is written in lines of ``stride``
    tokens (section 5.3)."""

    def __init__(self, cfg):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(-(-cfg.window // cfg.stride), cfg.width))
        self.columns = nn.Parameter(torch.empty(cfg.stride, cfg.width))

    def forward(self, first, length):
        """Those of ``length`` positions from ``first`` on: ``[length, 1, H]``"""
        position = torch.arange(first, first + length, device=self.rows.device)
        stride = len(self.columns)
        row = torch.div(position, stride, rounding_mode="floor")
        return (self.rows[row] + self.columns[position % stride]).unsqueeze(1)


class SparseTransformerLayer(nn.Module):
    """Attention and a feed-forward layer (equations 12 to 14). The first layer also adds the
    positions to the embedded tokens."""

    def __init__(self, cfg, index):
        super().__init__()
        self.p = cfg.dropout
        self.positions = GridPositions(cfg) if index == 0 else None
        self.norm_attention = nn.LayerNorm(cfg.width)
        self.attention = SparseAttention(cfg, index)
        self.norm_feed_forward = nn.LayerNorm(cfg.width)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, 0.0, gelu)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds ``keys`` and ``values`` of the
        window so far, ``[rows, B, H]``, and in the first layer its ``tokens``."""
        if self.positions is not None:
            seen = state["keys"].size(0) if state else 0
            h = h + self.positions(seen, h.size(0))
        attended, new_state = self.attention(self.norm_attention(h), state, context.training)
        h = h + dropout(attended, self.p, context.training)
        wide = self.feed_forward(self.norm_feed_forward(h), context.training)
        return h + dropout(wide, self.p, context.training), new_state


class SparseTransformerDecoder(WindowDecoder):
    """Embedding, layers, a last norm, and an output matrix of its own without a bias."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [SparseTransformerLayer(cfg, i) for i in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            cfg.window,
            cfg.eval_stride,
            tied=False,
            final_norm=nn.LayerNorm(cfg.width, eps=1e-6),
        )
        bias = self.head.bias.detach().zero_()
        del self.head.bias
        self.head.register_buffer("bias", bias, persistent=False)  # stays 0
        deviations = initial_deviations(cfg)
        for name, parameter in self.named_parameters():
            kind = next((end for end in deviations if name.endswith(end)), None)
            if kind is not None:
                nn.init.normal_(parameter, std=deviations[kind])
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def initial_deviations(cfg):
    """Standard deviations of initial weights (section 6), by the ends of parameters' names."""
    residual = (2 * cfg.num_layers) ** -0.5
    in_paper = str(cfg.initial_weights) == "paper"

    def scaled(inputs):
        return 0.125 / inputs**0.5 if in_paper else (0.125 / inputs) ** 0.5

    positions = scaled(2 * cfg.width) if in_paper else 0.007 / 2**0.5
    return {
        "embedding.weight": scaled(cfg.width) if in_paper else 0.013,
        "positions.rows": positions,
        "positions.columns": positions,
        "query.weight": scaled(cfg.width),
        "key.weight": scaled(cfg.width),
        "value.weight": scaled(cfg.width),
        "attention.output.weight": residual * scaled(cfg.width),
        "linear1.weight": scaled(cfg.width),
        "linear2.weight": residual * scaled(cfg.d_inner),
        "head.weight": 0.0 if in_paper else scaled(cfg.width),
    }


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    sizes = ("width", "num_layers", "n_head", "d_inner", "stride", "summary", "num_summaries")
    require_at_least(1, cfg, *sizes)
    require_heads_that_divide(cfg)
    require_dropouts(cfg, "dropout")
    check_window(cfg)
    if str(cfg.pattern) != "fixed":
        return  # the others have no summaries
    if cfg.stride % cfg.summary:
        raise UserError(
            f"--summary {cfg.summary}: must divide --stride {cfg.stride}; choose another"
        )
    if cfg.num_summaries * cfg.summary > cfg.stride:
        raise UserError(
            f"--num-summaries {cfg.num_summaries}: a block of --stride {cfg.stride} has "
            f"{cfg.stride // cfg.summary} parts of --summary {cfg.summary} at most; lower it"
        )


ARCHITECTURES = {
    # The paper's 95M parameters.
    "sparse_transformer_enwik8": {},
    # Learns something on two CPU cores in minutes: 3.3M parameters.
    "sparse_transformer_small": {
        "width": Size(256, "chosen here, for two CPU cores"),
        "num_layers": Size(4, "chosen here, for two CPU cores"),
        "n_head": Size(4, "chosen here, for two CPU cores"),
        "d_inner": Size(1024, "paper, 4 H"),
        "window": Size(512, "chosen here, for two CPU cores"),
        "eval_stride": Size(128, "chosen here, for two CPU cores"),
        "stride": Size(32, "chosen here, about the square root of the window"),
        "summary": Size(8, "chosen here, stride / 4 as in the paper"),
        "dropout": Size(0.0, "chosen here, for short training"),
    },
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "n_head": 2,
        "d_inner": 32,
        "window": 60,
        "eval_stride": 20,
        "stride": 8,
        "summary": 2,
        "initial_weights": "code",
        "dropout": 0.1,
    },
    training="--optimizer adam --lr 0.03 --lr-scheduler cosine --clip-norm 1.0",
    variants={
        "fixed": {"window": 20, "eval_stride": 5},
        "strided": {"pattern": "strided", "window": 20, "eval_stride": 5},
        "dense": {"pattern": "dense", "window": 20, "eval_stride": 5},
    },
)


@register_family("sparse_transformer", SparseTransformerConfig, ARCHITECTURES, TINY)
class SparseTransformer(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(SparseTransformerDecoder(cfg, task.source_dictionary))
