"""SRU++: T. Lei, "When Attention Meets Fast Recurrence: Training Language Models with Reduced
Compute", arXiv 2102.12459."""

import math
import re
from dataclasses import dataclass, field

import torch
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
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.ops import (
    attend,
    causal_bias,
    dropout,
    next_keys_and_values,
    next_memory,
    remembers_inputs,
    sru,
)


@dataclass
class SRUppConfig(AdaptiveConfig):
    width: int = field(
        default=3072, metadata={"help": "width D of embedding and layers (default: paper, base)"}
    )
    projection: int = field(
        default=768,
        metadata={"help": "width P of the projection that attention works in (default: paper)"},
    )
    num_layers: int = field(default=10, metadata={"help": "number of layers (default: paper)"})
    n_head: int = field(
        default=1, metadata={"help": "heads of each layer that attends (default: paper)"}
    )
    attn_every_n_layers: int = field(
        default=1,
        metadata={"help": "every how many layers one attends; 1 for all (default: paper, base)"},
    )
    layer_norm: bool = field(
        default=False,
        metadata={
            "help": "normalise each layer's input, but not its memory: the score then depends on "
            "where segments begin (default: paper, enwik8)"
        },
    )
    highway_bias: float = field(
        default=-2.0, metadata={"help": "initial bias of the reset gate (default: paper's code)"}
    )
    eval_unroll: int = field(
        default=3072,
        metadata={
            "help": "at evaluation: tokens before itself that each attends to, once there are so "
            "many (default: paper, base)"
        },
    )
    dropout: float = field(
        default=0.22,
        metadata={
            "help": "dropout of the embedding, in each layer and of the last output "
            "(default: paper, base)"
        },
    )
    dropatt: float = field(
        default=0.22, metadata={"help": "dropout of attention weights (default: paper, base)"}
    )


class SRUppLayer(nn.Module):
    """Attention in a narrow projection, from which a wide SRU gets its input (section 3)."""

    recurrence = staticmethod(sru)

    def __init__(self, cfg, attends, last):
        super().__init__()
        self.width = cfg.width
        self.n_head = cfg.n_head
        self.eval_unroll = cfg.eval_unroll
        self.p = cfg.dropout
        self.p_attention = cfg.dropatt
        # The last layer's output is dropped by the decoder.
        self.p_state = 0.0 if last else cfg.dropout
        self.norm_input = nn.LayerNorm(cfg.width) if cfg.layer_norm else None
        self.project = nn.Linear(cfg.width, cfg.projection, bias=False)
        self.key_value = None
        if attends:
            self.key_value = nn.Linear(cfg.projection, 2 * cfg.projection, bias=False)
            self.alpha = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(cfg.projection)
        self.expand = nn.Linear(cfg.projection, 3 * cfg.width, bias=False)  # rows: u0, u1, u2
        self.weight = nn.Parameter(torch.empty(2, cfg.width))  # v_f, v_r
        self.bias = nn.Parameter(torch.empty(2, cfg.width))  # b_f, b_r

    def forward(self, x, state, context):
        """``x [T, B, D]`` and state to the same. The state holds ``c [1, B, D]``, in float32 or
        wider, and, if the layer attends, ``memory``, inputs of this layer, ``[rows, B, D]``; in
        evaluation without gradients their ``keys`` and ``values`` instead, ``[rows, B, P]``."""
        training = context.training
        z = self.project(x if self.norm_input is None else self.norm_input(x))
        new_state = {}
        if self.key_value is not None:
            keys, values, new_state = self.remember(x, z, state, training)
            z = z + self.alpha * self.attention(z, keys, values, training)
        u = self.expand(dropout(self.norm(z), self.p, training))
        c0 = state["c"][0] if state else torch.zeros_like(x[0])
        mask = None
        if training and self.p_state > 0:
            mask = dropout(torch.ones_like(x[0]), self.p_state)
        out, c = self.recurrence(u.unflatten(-1, (3, -1)), x, self.weight, self.bias, c0, mask)
        return out, {**new_state, "c": c.unsqueeze(0)}

    def remember(self, x, z, state, training):
        """Keys and values of memory and segment, ``[M + T, B, P]``, and the next state."""
        if remembers_inputs(state, training):
            memory = state["memory"] if state else x[:0]
            keys, values = self.key_value(torch.cat([self.project(memory), z])).chunk(2, -1)
            # In training the memory is the segment before, whatever its length.
            new_memory = x if training else next_memory(memory, x, self.eval_unroll)
            return keys, values, {"memory": new_memory}
        own = later = self.key_value(z).chunk(2, -1)
        if self.norm_input is not None:  # the memory is not normalised
            later = self.key_value(self.project(x)).chunk(2, -1)
        remembered, new_state = next_keys_and_values(state, later, self.eval_unroll)
        keys, values = (torch.cat(rows) for rows in zip(remembered, own))
        return keys, values, new_state

    def attention(self, q, keys, values, training):
        """Attention of the segment's projections ``[T, B, P]`` over keys and values of memory and
        segment, ``[M + T, B, P]``."""
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).flatten(1, 2) for x in (q, keys, values))
        # Training sees the whole memory, evaluation a band.
        bias = causal_bias(q, k, None if training else self.eval_unroll + 1)
        mix = attend(q, k, v, bias, self.p_attention if training else 0.0)
        return mix.unflatten(1, (-1, self.n_head)).flatten(2)


class SRUppDecoder(SegmentDecoder):
    """Embedding, layers of which every k-th attends, output: untied, or both adaptive."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [
            SRUppLayer(cfg, (i + 1) % cfg.attn_every_n_layers == 0, i == cfg.num_layers - 1)
            for i in range(cfg.num_layers)
        ]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            bands=bands(cfg, dictionary),
            tied=False,
            dropout_input=cfg.dropout,
            dropout_output=cfg.dropout,
        )
        bound = math.sqrt(3 / cfg.width)
        for name, parameter in self.vocabulary_parameters():
            if "projections" in name:
                nn.init.xavier_uniform_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
            else:  # whatever the width of the band
                nn.init.uniform_(parameter, -bound, bound)
        for layer in self.layers:
            for linear in (layer.project, layer.key_value, layer.expand):
                if linear is not None:
                    nn.init.xavier_uniform_(linear.weight)
            with torch.no_grad():
                layer.expand.weight.mul_(math.sqrt(1 - cfg.dropout))
                nn.init.uniform_(layer.weight, -1, 1)
                layer.bias[0], layer.bias[1] = 0, cfg.highway_bias


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    sizes = ("width", "projection", "num_layers", "n_head", "attn_every_n_layers", "eval_unroll")
    require_at_least(1, cfg, *sizes)
    if cfg.projection % cfg.n_head:
        raise UserError(
            f"--n-head {cfg.n_head}: does not divide --projection {cfg.projection}; heads share it "
            "evenly"
        )
    require_dropouts(cfg, "dropout", "dropatt")


def _prepare(weights, settings):
    """Bring the published layout into ours: recurrence parameters ``[2 D]`` become ``[2, D]``; the
    rows of the last map, ordered by unit, are ordered by gate. In layers without attention that map
    is called linear2, in all others linear3; here it is always linear3. The rows of the first band
    end with those of the clusters, in reversed order."""
    prepared = {}
    clusters = sum(bool(re.match(r"output_layer\.out_layers\.[1-9].*\.bias", n)) for n in weights)
    for name, value in weights.items():
        layer, linear = re.match(r"(.*\.transform_module\.)(linear\d)\.weight|", name).groups()
        if linear == "linear2" and f"{layer}alpha" not in weights:
            name, linear = f"{layer}linear3.weight", "linear3"
        if linear == "linear3" and value.dim() == 2 and len(value) % 3 == 0:
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if re.search(r"\.(weight_c|bias)$", name) and "rnn_lst" in name and value.dim() == 1:
            if "layer_norm" not in name and len(value) % 2 == 0:
                value = value.unflatten(0, (2, -1))
        first_band = re.match(r"(\w+_layer)\.(out_layers\.0\.(weight|bias)|emb_weights\.0)$", name)
        if first_band and clusters and value.dim() > 0 and len(value) > clusters:
            value, rows = value.tensor_split([len(value) - clusters])
            prepared[f"{first_band[1]}.cluster_{first_band[3] or 'weight'}"] = rows.flip(0)
        prepared[name] = value
    return prepared


def _sizes(weights):
    prefix = "rnn.rnn_lst"
    layers = num_layers(weights, prefix)
    attends = [f"{prefix}.{i}.transform_module.alpha" in weights for i in range(layers)]
    width = shape_of(weights, f"{prefix}.0.transform_module.linear1.weight", 2)[1]
    return {
        "width": width,
        "projection": shape_of(weights, f"{prefix}.0.transform_module.linear1.weight", 2)[0],
        "num_layers": layers,
        "attn_every_n_layers": 1 + attends.index(True) if True in attends else layers + 1,
        "layer_norm": f"{prefix}.0.layer_norm.weight" in weights,
        **adaptive_sizes(weights, width, "all", ADAPTIVE_NAMES),
    }


def _constant(name, weights):
    """A scale of the input that the published code saves, and leaves at 1."""
    return torch.ones_like(weights[name]) if name.endswith(".scale_x") else None


#: Names of embeddings, their projections, the head's layers and theirs, before the band's number.
ADAPTIVE_NAMES = (
    "embedding_layer.emb_weights",
    "embedding_layer.emb_projs",
    "output_layer.out_layers",
    "output_layer.out_projs",
)

#: Weights of the published code, github.com/asappresearch/sru, experiments/srupp_experiments.
PUBLISHED = PublishedWeights(
    layer_prefix="rnn.rnn_lst",
    whole_names={
        **adaptive_names(*ADAPTIVE_NAMES),
        "output_layer.cluster_weight": "head.cluster_weight",
        "embedding_layer.cluster_weight": "head.cluster_weight",
        "output_layer.cluster_bias": "head.cluster_bias",
        "embedding_layer.weight": "embedding.weight",
        "output_layer.weight": "head.weight",
        "output_layer.bias": "head.bias",
    },
    layer_names={
        "weight_c": "weight",
        "bias": "bias",
        "layer_norm": "norm_input",
        "transform_module.alpha": "alpha",
        "transform_module.layer_norm": "norm",
        "transform_module.linear1": "project",
        "transform_module.linear2": "key_value",
        "transform_module.linear3": "expand",
    },
    vocabulary=("embedding.weight", "head.weight", "head.bias"),
    settings={
        **same_settings("n_head", "attn_every_n_layers", "eval_unroll"),
        "attn_heads": Setting("n_head"),
        "eval_unroll_size": Setting("eval_unroll"),
        **ADAPTIVE_SETTINGS,
    },
    sizes=_sizes,
    constant=_constant,
    prepare=_prepare,
)

WIKITEXT103 = {
    "cutoffs": Size([19997, 39997, 199997], "published code, WikiText-103"),
    "div_val": Size(4.0, "published code, WikiText-103"),
    "embedding_width": Size(1024, "published code, WikiText-103"),
    "eval_unroll": Size(2560, "paper, WikiText-103"),
}
BILLION_WORD = {
    "cutoffs": Size([59998, 159998], "published code, Billion Word"),
    "div_val": Size(4.0, "published code, Billion Word"),
    "embedding_width": Size(1024, "published code, Billion Word"),
    "tied_projections": Size("none", "published code, Billion Word"),
    "eval_unroll": Size(96, "published code, Billion Word"),
    "dropatt": Size(0.0, "published code, Billion Word"),
}

ARCHITECTURES = {
    # The paper's 108M parameters.
    "srupp_enwik8_base": {},
    # The paper's 195M parameters.
    "srupp_enwik8_large": {
        "width": Size(6016, "paper, large"),
        "projection": Size(752, "paper"),
        "dropout": Size(0.32, "paper, large"),
        "dropatt": Size(0.32, "paper, large"),
    },
    # The paper's 148M parameters, with the 267,735 words of WikiText-103.
    "srupp_wt103": {
        **WIKITEXT103,
        "dropout": Size(0.15, "published code, WikiText-103"),
        "dropatt": Size(0.15, "published code, WikiText-103"),
        "dropout_projection": Size(0.15, "published code, WikiText-103"),
    },
    # The paper's 234M. No command for this size was published: the dropout is that of the published
    # command for width 4096, which makes 232M.
    "srupp_wt103_large": {
        **WIKITEXT103,
        "width": Size(5952, "paper, WikiText-103, large"),
        "projection": Size(744, "paper, WikiText-103, large"),
        "dropout": Size(0.2, "published command, width 4096"),
        "dropatt": Size(0.2, "published command, width 4096"),
        "dropout_projection": Size(0.2, "published command, width 4096"),
    },
    # The paper's 328M, with 793,470 words.
    "srupp_lm1b": {
        **BILLION_WORD,
        "width": Size(4096, "published code, Billion Word"),
        "projection": Size(1024, "published code, Billion Word"),
        "dropout": Size(0.05, "published code, Billion Word"),
    },
    # The paper's 465M.
    "srupp_lm1b_large": {
        **BILLION_WORD,
        "width": Size(7616, "published code, Billion Word, large"),
        "projection": Size(1024, "published code, Billion Word"),
        "attn_every_n_layers": Size(5, "published code, Billion Word, large"),
        "dropout": Size(0.1, "published code, Billion Word, large"),
    },
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "projection": 8,
        "attn_every_n_layers": 2,
        "eval_unroll": 40,
        "dropout": 0.1,
    },
    training="--optimizer radam --weight-decay 0.1 --lr 0.2 --warmup-updates 5 --clip-norm 1.0",
    variants={
        "": {"eval_unroll": 9, "attn_every_n_layers": 1},
        "layer_norm": {"eval_unroll": 9, "layer_norm": True},
        "adaptive": {"eval_unroll": 9, "cutoffs": [7, 15], "div_val": 2.0, "embedding_width": 8},
    },
)


@register_family("srupp", SRUppConfig, ARCHITECTURES, TINY, PUBLISHED)
class SRUpp(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(SRUppDecoder(cfg, task.source_dictionary))
