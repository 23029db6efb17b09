"""Recurrent highway networks: J. G. Zilly et al., "Recurrent Highway Networks", arXiv 1607.03474.

The published code (github.com/jzilly/RecurrentHighwayNetworks) has two forms. The figures of
the README are of the one for TensorFlow, and so is this file: the bias of the transform gates is a
parameter, and both gates share dropout masks. (The Lua script adds a constant to two biases, draws
masks for each gate, and embeds bytes in vectors of width H.)
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_not_negative
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.l2_penalty import L2Penalty, L2PenaltyConfig
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.ops import dropout, recurrent_highway


@dataclass
class RHNConfig(L2PenaltyConfig):
    width: int = field(
        default=1500, metadata={"help": "width H of the state (default: paper, enwik8)"}
    )
    embedding_width: int = field(
        default=205,
        metadata={
            "help": "width of the embedding (default: published code, the number of symbols of "
            "enwik8)"
        },
    )
    num_layers: int = field(
        default=1, metadata={"help": "number of layers (default: paper, enwik8)"}
    )
    depth: int = field(
        default=10,
        metadata={"help": "micro-steps of a layer for each token (default: paper, enwik8)"},
    )
    transform_bias: float = field(
        default=-4.0,
        metadata={"help": "initial bias of the transform gates (default: published code, enwik8)"},
    )
    init_range: float = field(
        default=0.04,
        metadata={
            "help": "all other parameters start uniformly distributed within plus and minus this "
            "(default: published code, enwik8)"
        },
    )
    dropout_token: float = field(
        default=0.1,
        metadata={
            "help": "dropout of whole embedded tokens, the same for equal tokens of a segment "
            "(default: published code, enwik8)"
        },
    )
    dropout_input: float = field(
        default=0.4,
        metadata={
            "help": "dropout of a layer's input, with one mask for the whole segment "
            "(default: published code, enwik8)"
        },
    )
    dropout_hidden: float = field(
        default=0.1,
        metadata={
            "help": "dropout of the state where it enters a matrix, with one mask for all "
            "micro-steps of the segment (default: published code, enwik8)"
        },
    )
    dropout_output: float = field(
        default=0.4,
        metadata={
            "help": "dropout of what the softmax reads, with one mask for the whole segment "
            "(default: published code, enwik8)"
        },
    )


class RHNLayer(nn.Module):
    """A recurrent highway layer; its state holds ``s``, ``[1, B, H]``, in float32 or wider.

    Args:
        cfg (RHNConfig): the settings
        input_width (int): of the input
    """

    recurrence = staticmethod(recurrent_highway)

    def __init__(self, cfg, input_width):
        super().__init__()
        self.dropout_input, self.dropout_hidden = cfg.dropout_input, cfg.dropout_hidden
        # Rows of the candidate, then of the transform gate.
        self.input = nn.Linear(input_width, 2 * cfg.width, bias=False)
        self.weights = nn.Parameter(torch.empty(cfg.depth, 2 * cfg.width, cfg.width))
        self.biases = nn.Parameter(torch.empty(cfg.depth, 2 * cfg.width))

    def forward(self, x, state, context):
        """``x [T, B, input_width]`` and state to ``s [T, B, H]`` and state."""
        x = dropout(x, self.dropout_input, context.training, shared=(0,))
        s0 = state["s"][0] if state else x.new_zeros(x.size(1), self.weights.size(2))
        mask = None
        if context.training and self.dropout_hidden > 0:
            mask = dropout(x.new_ones(s0.shape), self.dropout_hidden)
        out, s = self.recurrence(self.input(x), s0, self.weights, self.biases, mask)
        return out, {"s": s.unsqueeze(0)}


class RHNDecoder(L2Penalty, SegmentDecoder):
    """Embedding, layers, and a softmax with weights of its own."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [
            RHNLayer(cfg, cfg.width if i else cfg.embedding_width) for i in range(cfg.num_layers)
        ]
        # Its own dropout of the output has a mask for each element.
        super().__init__(cfg, dictionary, layers, cfg.width, tied=False)
        self.dropout_token, self.dropout_features = cfg.dropout_token, cfg.dropout_output
        self.embedding = nn.Embedding(len(dictionary), cfg.embedding_width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -cfg.init_range, cfg.init_range)
        for layer in self.layers:
            nn.init.constant_(layer.biases[:, cfg.width :], cfg.transform_bias)

    def embed(self, tokens, training):
        h = self.embedding(tokens)
        if training and self.dropout_token > 0:
            streams = tokens.size(1)
            kept = dropout(h.new_ones(len(self.dictionary), streams), self.dropout_token)
            h = h * kept[tokens, torch.arange(streams, device=tokens.device)].unsqueeze(2)
        return h

    def combine(self, hidden, context):
        return dropout(hidden[-1], self.dropout_features, context.training, shared=(0,))


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "embedding_width", "num_layers", "depth")
    require_not_negative(cfg, "init_range")
    require_dropouts(cfg, "dropout_token", "dropout_input", "dropout_hidden", "dropout_output")


#: Of the published code, whose loss is summed over 50 steps.
L2 = Size(1e-7 / 50, "published code, per token")

ARCHITECTURES = {
    "rhn_enwik8": {"l2_penalty": L2},
    "rhn_enwik8_small": {"l2_penalty": L2, "width": Size(1000, "paper, 21M parameters")},
}

TINY = Tiny(
    model={
        "width": 24,
        "embedding_width": 12,
        "num_layers": 2,
        "depth": 2,
        "transform_bias": -1.0,
        "init_range": 0.2,
        "dropout_token": 0.05,
        "dropout_input": 0.05,
        "dropout_hidden": 0.05,
        "dropout_output": 0.05,
        "l2_penalty": 1e-6,
    },
    training="--optimizer adam --lr 0.02 --clip-norm 1.0 "
    "--criterion cross_entropy_with_auxiliary_losses",
    variants={"": {}},
)


@register_family("rhn", RHNConfig, ARCHITECTURES, TINY)
class RHN(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(RHNDecoder(cfg, task.source_dictionary))
