"""SHA-RNN: S. Merity, "Single Headed Attention RNN: Stop Thinking With Your Head",
arXiv 1911.11423."""

import re
from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import register_model
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts
from fairseq_sha.errors import UserError
from fairseq_sha.models.published_weights import (
    PublishedWeights,
    num_layers,
    shape_of,
    split_layer,
)
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import (
    LSTM,
    SRU,
    Boom,
    LayerNormLSTM,
    MinGRU,
    MinLSTM,
    SingleHeadAttention,
)
from fairseq_sha.ops import dropout, last_rows, rows_to_attend

CELLS = {
    "lstm": LSTM,
    "layer_norm_lstm": LayerNormLSTM,
    "sru": SRU,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
}


@dataclass
class SHARNNConfig(FairseqDataclass):
    width: int = field(
        default=1024, metadata={"help": "width H of embedding and layers (default: paper, enwik8)"}
    )
    num_layers: int = field(default=4, metadata={"help": "number of layers (default: paper)"})
    cell: ChoiceEnum(list(CELLS)) = field(
        default="lstm",
        metadata={
            "help": "recurrent cell: lstm, layer_norm_lstm (slow: a loop over time), sru, min_gru "
            "or min_lstm (default: paper)"
        },
    )
    attention_layers: List[int] = field(
        default_factory=lambda: [2],
        metadata={
            "help": "layers that attend, counted from 0, such as 0,1,2,3; [] for none "
            "(default: the second-last of four, as in the paper)"
        },
    )
    window: int = field(
        default=5000,
        metadata={
            "help": "attention window in tokens: memory and current segment together "
            "(default: author's published code)"
        },
    )
    boom_multiple: int = field(
        default=4, metadata={"help": "width of the boom layer in multiples of H (default: paper)"}
    )
    dropout_embedding: float = field(
        default=0.0,
        metadata={"help": "dropout of whole embedding rows (default: paper, table 2)"},
    )
    dropout_input: float = field(
        default=0.1, metadata={"help": "dropout of embedded tokens (default: paper, table 2)"}
    )
    dropout_hidden: float = field(
        default=0.1,
        metadata={"help": "dropout of LSTM outputs, attention and boom (default: paper, table 2)"},
    )
    dropout_output: float = field(
        default=0.1, metadata={"help": "dropout of the last output (default: paper, table 2)"}
    )
    value_gate: ChoiceEnum(["overparameterised", "plain"]) = field(
        default="overparameterised",
        metadata={
            "help": "gate on the attention values: an over-parameterised vector, or a plain one "
            "(default: paper, section 3.3)"
        },
    )
    collapse: bool = field(
        default=False,
        metadata={
            "help": "keep of each over-parameterised vector only the constant that it amounts to; "
            "weights trained without this load with it and give the same output"
        },
    )


class SHARNNLayer(nn.Module):
    """A recurrent cell, a single attention head where ``attends``, and boom."""

    def __init__(self, cfg, attends):
        super().__init__()
        self.p = cfg.dropout_hidden
        self.window = cfg.window
        self.norm_start = norm(cfg.width)
        self.cell = CELLS[str(cfg.cell)](cfg.width)
        self.attention = None
        if attends:
            self.norm_memory = norm(cfg.width)
            self.norm_mid = norm(cfg.width)
            self.attention = SingleHeadAttention(
                cfg.width,
                cfg.dropout_hidden,
                overparameterised=cfg.value_gate == "overparameterised",
                collapsed=cfg.collapse,
            )
        self.norm_boom = norm(cfg.width)
        self.norm_residual = norm(cfg.width)
        self.boom = Boom(cfg.width, cfg.boom_multiple, cfg.dropout_hidden)

    def forward(self, h, state):
        """``h [T, B, H]`` and state to the same; the state holds the cell's and, where the layer
        attends, ``memory [rows <= window, B, H]``."""
        # Not residual: the cell's output replaces h.
        h, left = self.cell(self.norm_start(h), state)
        h = dropout(h, self.p, self.training)
        if self.attention is not None:
            own = self.norm_memory(h)
            # The window does not slide within a segment.
            room = max(self.window - len(h), 0)
            memory = last_rows(state["memory"], room) if state else h[:0].detach()
            seen = torch.cat([memory, own])
            left["memory"] = last_rows(seen, self.window)
            h = self.norm_mid(h)
            h = h + self.attention(h, *rows_to_attend(memory, own, seen), self.training)
        boomed = self.boom(self.norm_boom(h), self.training)
        return self.norm_residual(h) + dropout(boomed, self.p, self.training), left


class SHARNNDecoder(SegmentDecoder):
    """Embedding, layers of which some attend, tied output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [SHARNNLayer(cfg, i in cfg.attention_layers) for i in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            dropout_embedding=cfg.dropout_embedding,
            dropout_input=cfg.dropout_input,
            dropout_output=cfg.dropout_output,
        )
        # Layer norms keep torch's ones and zeros: drawn like the linear weights, training stalls.
        # Cells come as they initialise themselves.
        cells = {module for layer in self.layers for module in layer.cell.modules()}
        for module in self.modules():
            if module not in cells and isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.1 / cfg.width**0.5)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)


def norm(width):
    return nn.LayerNorm(width, eps=1e-12)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "window", "boom_multiple")
    require_dropouts(cfg, "dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output")
    for layer in cfg.attention_layers:
        if not 0 <= layer < cfg.num_layers:
            raise UserError(
                f"--attention-layers {layer}: there are {cfg.num_layers} layers, counted from 0"
            )


@register_model("sha_rnn", dataclass=SHARNNConfig)
class SHARNN(SegmentLanguageModel):
    """The model family; the named architectures differ from it in their defaults only."""

    @classmethod
    def build_model(cls, cfg, task):
        length = getattr(task.cfg, "tokens_per_sample", 0)
        if cfg.attention_layers and cfg.window < length and getattr(task, "is_training", False):
            raise UserError(
                f"--window {cfg.window}: below --tokens-per-sample {length}, and the window holds "
                "the segment itself; raise it, or shorten segments"
            )
        return cls(SHARNNDecoder(cfg, task.source_dictionary))


@dataclass
class SHARNNEnwik8Config(SHARNNConfig):
    pass


@register_model("sha_rnn_enwik8", dataclass=SHARNNEnwik8Config)
class SHARNNEnwik8(SHARNN):
    """The paper's model: one head, in the second-last layer."""


@dataclass
class SHARNNEnwik8FullConfig(SHARNNConfig):
    attention_layers: List[int] = field(
        default_factory=lambda: [0, 1, 2, 3],
        metadata={"help": "layers that attend, counted from 0 (default: paper, a head per layer)"},
    )


@register_model("sha_rnn_enwik8_full", dataclass=SHARNNEnwik8FullConfig)
class SHARNNEnwik8Full(SHARNN):
    """A head in every layer."""


@dataclass
class SHALSTMEnwik8Config(SHARNNConfig):
    attention_layers: List[int] = field(
        default_factory=list,
        metadata={"help": "layers that attend, counted from 0 (default: paper, no head)"},
    )


@register_model("sha_lstm_enwik8", dataclass=SHALSTMEnwik8Config)
class SHALSTMEnwik8(SHARNN):
    """No attention at all."""


@dataclass
class SHARNNSmallConfig(SHARNNConfig):
    width: int = field(
        default=256,
        metadata={"help": "width H of embedding and layers (default: for two CPU cores)"},
    )
    window: int = field(
        default=1024,
        metadata={
            "help": "attention window in tokens: memory and current segment together "
            "(default: for two CPU cores)"
        },
    )


@register_model("sha_rnn_small", dataclass=SHARNNSmallConfig)
class SHARNNSmall(SHARNN):
    """A model that learns something on two CPU cores in minutes."""


def _sizes(weights):
    _, width = shape_of(weights, "encoder.weight", 2)
    layers = num_layers(weights, "blocks")
    return {
        "width": width,
        "num_layers": layers,
        "boom_multiple": shape_of(weights, "blocks.0.ff.linear1.weight", 2)[0] // width,
        "attention_layers": [i for i in range(layers) if f"blocks.{i}.attn.q.weight" in weights],
    }


def _constant(name, weights):
    """The published code creates norms and gates that it never uses: any value will do."""
    layer, rest = split_layer(name, "blocks")
    if layer is None:
        return None
    never_used = re.match(r"lnout\.(weight|bias)$|attn\.(qkvs|r_gate)$", rest)
    without_attention = f"blocks.{layer}.attn.q.weight" not in weights
    if never_used or (without_attention and re.match(r"ln(mem|mid)\.(weight|bias)$", rest)):
        return weights[name]
    return None


#: Weights of the published code, github.com/Smerity/sha-rnn.
PUBLISHED = PublishedWeights(
    layer_prefix="blocks",
    whole_names={
        "encoder.weight": "embedding.weight",
        "decoder.weight": "embedding.weight",
        "decoder.bias": "output_bias",
    },
    layer_names={
        "rnn": "cell",
        "lnstart": "norm_start",
        "lnmem": "norm_memory",
        "lnmid": "norm_mid",
        "lnxff": "norm_boom",
        "lnff": "norm_residual",
        "ff.linear1": "boom.linear",
        "attn.q": "attention.query",
        "attn.qln": "attention.query_norm",
        "attn.qs": "attention.query_gate",
        "attn.ks": "attention.key_gate",
        "attn.vs": "attention.value_gate.seed",
        "attn.vq.l1": "attention.value_gate.linear",
    },
    vocabulary=("embedding.weight", "output_bias"),
    settings=("window",),
    sizes=_sizes,
    constant=_constant,
    singletons=r"\.attn\.[qkv]s$",
)
