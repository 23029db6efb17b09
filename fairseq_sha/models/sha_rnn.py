"""SHA-RNN: S. Merity, "Single Headed Attention RNN: Stop Thinking With Your Head",
arXiv 1911.11423."""

import re
from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import ChoiceEnum
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts
from fairseq_sha.errors import UserError
from fairseq_sha.models.embeddings import AdaptiveConfig, bands
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.published_weights import (
    PublishedWeights,
    num_layers,
    same_settings,
    shape_of,
    split_layer,
)
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import (
    LSTM,
    QRNN,
    SRU,
    Boom,
    FeedForward,
    LayerNormLSTM,
    MinGRU,
    MinLSTM,
    NGramEmbedding,
    SingleHeadAttention,
)
from fairseq_sha.modules.boom import gelu
from fairseq_sha.ops import dropout, last_rows, rows_to_attend

CELLS = {
    "lstm": LSTM,
    "layer_norm_lstm": LayerNormLSTM,
    "sru": SRU,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "qrnn": QRNN,
}


@dataclass
class SHARNNConfig(AdaptiveConfig):
    width: int = field(
        default=1024, metadata={"help": "width H of embedding and layers (default: paper, enwik8)"}
    )
    num_layers: int = field(default=4, metadata={"help": "number of layers (default: paper)"})
    cell: ChoiceEnum(list(CELLS)) = field(
        default="lstm",
        metadata={
            "help": "recurrent cell: lstm, layer_norm_lstm, sru, min_gru, "
            "min_lstm or qrnn (default: paper)"
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
    feed_forward: ChoiceEnum(["boom", "full"]) = field(
        default="boom",
        metadata={
            "help": "boom: chunks of the wide layer are summed; full: a second matrix maps it "
            "back, as in Transformers, with as many parameters at half of the width "
            "(default: paper, section 3.2)"
        },
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
    initialisation: ChoiceEnum(["published", "torch"]) = field(
        default="published",
        metadata={
            "help": "published: normal, of standard deviation 0.1 / sqrt(H); torch: as torch's "
            "linear layers, and 1 / sqrt(H) for the embedding; training starts faster "
            "(default: author's published code)"
        },
    )
    ngram_orders: List[int] = field(
        default_factory=list,
        metadata={
            "help": "add hashed embeddings of the n-grams of these lengths that end in each token, "
            "such as 2,3,4; [] for none (default: paper)"
        },
    )
    ngram_buckets: int = field(
        default=8192, metadata={"help": "rows of the table of each length (default: chosen here)"}
    )
    collapse: bool = field(
        default=False,
        metadata={
            "help": "keep only the constant that each over-parameterised vector evaluates to; "
            "weights trained without this option load with it and give the same output"
        },
    )


class SHARNNLayer(nn.Module):
    """A recurrent cell, a single attention head if it ``attends``, and boom (figure 1)."""

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
        self.boom = feed_forward(cfg)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds the cell's state and, if the layer
        attends, ``memory [rows <= window, B, H]``."""
        # Not residual: the cell's output replaces h.
        h, new_state = self.cell(self.norm_start(h), state)
        h = dropout(h, self.p, context.training)
        if self.attention is not None:
            own = self.norm_memory(h)
            # The window holds memory and segment together, and does not slide within a segment.
            room = self.window - len(h)
            memory = last_rows(state["memory"], room) if state else own[:0].detach()
            new_state["memory"] = torch.cat([memory, own])
            h = self.norm_mid(h)
            rows, memory = rows_to_attend(memory, own, new_state["memory"])
            h = h + self.attention(h, rows, memory, context.training)
        boomed = self.boom(self.norm_boom(h), context.training)
        return self.norm_residual(h) + dropout(boomed, self.p, context.training), new_state


class SHARNNDecoder(SegmentDecoder):
    """Embedding, layers of which some attend, tied output (section 3)."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [SHARNNLayer(cfg, i in cfg.attention_layers) for i in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            bands=bands(cfg, dictionary),
            dropout_embedding=cfg.dropout_embedding,
            dropout_input=cfg.dropout_input,
            dropout_output=cfg.dropout_output,
            ngrams=ngrams(cfg),
        )
        if cfg.attention_layers:
            self.max_segment = cfg.window
        # Layer norms keep torch's ones and zeros: drawn like the linear weights, training stalls.
        # Cells come as they initialise themselves.
        published = str(cfg.initialisation) == "published"
        std = (0.1 if published else 1.0) / cfg.width**0.5
        for name, parameter in self.vocabulary_parameters():
            if "weight" in name:
                nn.init.normal_(parameter, std=std)
        if not published:
            return
        cells = {module for layer in self.layers for module in layer.cell.modules()}
        for module in self.layers.modules():
            if module not in cells and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)


def ngrams(cfg):
    """The :class:`~fairseq_sha.modules.NGramEmbedding` of a config, or None."""
    if not cfg.ngram_orders:
        return None
    return NGramEmbedding(list(cfg.ngram_orders), cfg.ngram_buckets, cfg.width)


def feed_forward(cfg):
    """The layer after the cell and the attention: boom, or the usual one with the same GELU."""
    if cfg.feed_forward == "full":
        inner = cfg.boom_multiple * cfg.width
        return FeedForward(cfg.width, inner, cfg.dropout_hidden, gelu)
    return Boom(cfg.width, cfg.boom_multiple, cfg.dropout_hidden)


def norm(width):
    return nn.LayerNorm(width, eps=1e-12)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "window", "boom_multiple")
    require_dropouts(cfg, "dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output")
    require_at_least(1, cfg, "ngram_buckets")
    if any(n < 2 for n in cfg.ngram_orders):
        raise UserError(f"--ngram-orders {cfg.ngram_orders}: each must be at least 2")
    for layer in cfg.attention_layers:
        if not 0 <= layer < cfg.num_layers:
            raise UserError(
                f"--attention-layers {layer}: there are {cfg.num_layers} layers, counted from 0"
            )


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
        "decoder.weight": "head.weight",
        "decoder.bias": "head.bias",
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
    vocabulary=("embedding.weight", "head.bias"),
    settings=same_settings("window"),
    sizes=_sizes,
    constant=_constant,
    singletons=r"\.attn\.[qkv]s$",
)

ARCHITECTURES = {
    # One head, in the second-last layer.
    "sha_rnn_enwik8": {},
    "sha_rnn_enwik8_full": {
        "attention_layers": Size([0, 1, 2, 3], "paper, a head per layer"),
    },
    "sha_lstm_enwik8": {
        "attention_layers": Size([], "paper, no head"),
    },
    # Not in the paper: of the size of the published base models of WikiText-103, 150M parameters
    # with its 267,735 words.
    "sha_rnn_wt103": {
        "cutoffs": Size([20000, 40000, 200000], "chosen here, as Transformer-XL's"),
        "div_val": Size(4.0, "chosen here, as in SRU++"),
        "embedding_width": Size(1024, "chosen here, as in SRU++"),
        "width": Size(1472, "chosen here, for 150M"),
    },
    # Learns something on two CPU cores in minutes.
    "sha_rnn_small": {
        "width": Size(256, "for two CPU cores"),
        "window": Size(1024, "for two CPU cores"),
    },
}

TINY = Tiny(
    model={"width": 16, "num_layers": 2, "attention_layers": [1], "window": 60},
    training="--optimizer min_trust_lamb --min-trust 0.25 --lr 0.01 --warmup-updates 5 "
    "--clip-norm 0.25",
    variants={
        **{cell: {"cell": cell, "window": 12} for cell in CELLS},
        "full": {"window": 12, "feed_forward": "full"},
        "ngrams": {"window": 12, "ngram_orders": [2, 4], "ngram_buckets": 30},
        "adaptive": {"window": 12, "cutoffs": [7, 15], "div_val": 2.0, "dropout_embedding": 0.1},
    },
)


@register_family("sha_rnn", SHARNNConfig, ARCHITECTURES, TINY, PUBLISHED)
class SHARNN(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        length = getattr(task.cfg, "tokens_per_sample", 0)
        is_training = getattr(task, "is_training", False)
        # At a start, a dropped token is 0 in all layers as long as biases are, and each norm
        # multiplies its gradient by a million.
        has_biases = str(cfg.cell) != "sru" or str(cfg.initialisation) == "torch"
        if is_training and cfg.dropout_embedding > 0 and not has_biases:
            raise UserError(
                f"--dropout-embedding {cfg.dropout_embedding}: --cell sru begins with infinite "
                "gradients; leave it out, or use --initialisation torch"
            )
        if is_training and cfg.attention_layers and cfg.window < length:
            raise UserError(
                f"--window {cfg.window}: below --tokens-per-sample {length}, and the window holds "
                "the segment itself; raise it, or shorten segments"
            )
        return cls(SHARNNDecoder(cfg, task.source_dictionary))
