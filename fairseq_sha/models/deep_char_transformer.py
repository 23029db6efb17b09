"""T12 and T64: R. Al-Rfou et al., "Character-Level Language Modeling with Deeper Self-Attention",
arXiv 1808.04444.

A causal Transformer that is deep for its width, and trains with the help of auxiliary losses:

* every position of a segment predicts what follows it, not only the last one;
* every layer predicts it, with classifiers of its own. Layer ``l`` of ``n`` stops when ``l / 2n``
  of training is done;
* every position also predicts the byte after the next, at half the weight.

Each layer adds embeddings of positions of its own. There is no memory: segments come from random
places (``--random-windows``), and the published scores predict each byte from the 512 before it, by
a window that slides by one (``--context-window 511 --tokens-per-sample 512``).

The authors published no code. What the paper leaves open is an option here, or follows a third
party's code (github.com/nadavbh12/Character-Level-Language-Modeling-with-Deeper-Self-Attention):
blocks normalise their input, and a layer's classifiers read its output through the norm that this
layer's attention has for its input. The published counts, 44M and 235M, have no room for biases in
attention. They contain all classifiers; without those that only training needs they would be
41.2M and 218.7M.
"""

from dataclasses import dataclass, field

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_heads_that_divide
from fairseq_sha.errors import UserError
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.heads import SoftmaxHead
from fairseq_sha.models.segment_decoder import SegmentLanguageModel
from fairseq_sha.models.window_decoder import WindowDecoder, check_window, extend
from fairseq_sha.modules import FeedForward
from fairseq_sha.ops import attend, causal_bias

STD = 0.02  # of initial embeddings


@dataclass
class DeepCharTransformerConfig(FairseqDataclass):
    width: int = field(
        default=512, metadata={"help": "width H of embedding and layers (default: paper)"}
    )
    num_layers: int = field(default=64, metadata={"help": "number of layers (default: paper, T64)"})
    n_head: int = field(default=2, metadata={"help": "heads of each layer (default: paper)"})
    d_inner: int = field(
        default=2048, metadata={"help": "inner width of feed-forward layers (default: paper)"}
    )
    window: int = field(
        default=512,
        metadata={"help": "tokens that are seen at once, each with its position (default: paper)"},
    )
    eval_stride: int = field(
        default=128,
        metadata={
            "help": "in validation and generation: tokens by which the window moves when it is "
            "full; the published scores move it by 1, which takes 128 times as long "
            "(default: chosen here)"
        },
    )
    intermediate_losses: bool = field(
        default=True,
        metadata={
            "help": "let each layer predict, layer l of n until l / 2n of max-update is done "
            "(default: paper)"
        },
    )
    layer_losses: ChoiceEnum(["mean", "sum"]) = field(
        default="mean",
        metadata={
            "help": "how losses of the layers that predict are put together; the paper does not "
            "say (default: as in the third party's code)"
        },
    )
    num_targets: int = field(
        default=2,
        metadata={"help": "how many tokens ahead each position predicts (default: paper)"},
    )
    further_target_weight: float = field(
        default=0.5,
        metadata={"help": "weight of the losses of targets after the first (default: paper)"},
    )
    dropout: float = field(
        default=0.55,
        metadata={
            "help": "dropout of attention weights and inside feed-forward layers (default: paper)"
        },
    )
    attention_biases: bool = field(
        default=False,
        metadata={"help": "add biases in attention (default: as the published counts say)"},
    )
    scale_embedding: bool = field(
        default=True,
        metadata={
            "help": "multiply embedded tokens by the square root of the width; the paper does not "
            "say (default: as in the third party's code)"
        },
    )


class CausalAttention(nn.Module):
    """Each position attends to itself and to those before it in the window."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.p = cfg.dropout
        projections = [nn.Linear(cfg.width, cfg.width, cfg.attention_biases) for _ in range(4)]
        self.query, self.key, self.value, self.output = projections

    def forward(self, h, state, training):
        """``h [T, B, H]`` and the state of the window to the same."""
        k, v, new_state = extend(state, self.key(h), self.value(h), training)
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).flatten(1, 2) for x in (self.query(h), k, v))
        mix = attend(q, k, v, causal_bias(q, k), self.p if training else 0.0)
        return self.output(mix.reshape(h.shape)), new_state


class DeepCharTransformerLayer(nn.Module):
    """Positions, attention and a feed-forward layer, each added to what comes in."""

    def __init__(self, cfg):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(cfg.window, cfg.width))
        self.norm_attention = nn.LayerNorm(cfg.width)
        self.attention = CausalAttention(cfg)
        self.norm_feed_forward = nn.LayerNorm(cfg.width)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, cfg.dropout)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds ``keys`` and ``values`` of the
        window so far, ``[rows, B, H]``, and in the first layer its ``tokens``."""
        seen = state["keys"].size(0) if state else 0
        h = h + self.positions[seen : seen + h.size(0)].unsqueeze(1)
        attended, new_state = self.attention(self.norm_attention(h), state, context.training)
        h = h + attended
        return h + self.feed_forward(self.norm_feed_forward(h), context.training), new_state


class DeepCharTransformerDecoder(WindowDecoder):
    """Embedding, layers, and classifiers of their own for each layer and target."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [DeepCharTransformerLayer(cfg) for _ in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            cfg.window,
            cfg.eval_stride,
            tied=False,
            embedding_scale=cfg.width**0.5 if cfg.scale_embedding else 1.0,
        )
        # Past nn.Module, for which it is a part of the last layer.
        self.__dict__["final_norm"] = layers[-1].norm_attention
        self.has_auxiliary_losses = cfg.intermediate_losses or cfg.num_targets > 1
        self.num_targets = cfg.num_targets
        self.further_target_weight = cfg.further_target_weight
        self.averages_layers = str(cfg.layer_losses) == "mean"
        predicting = cfg.num_layers if cfg.intermediate_losses else 1
        # Of layers from the last on, for each target; the decoder's own head is the first of all.
        self.classifiers = nn.ModuleList(
            [
                nn.ModuleList([self._make_head() for _ in range(cfg.num_targets - (i == 0))])
                for i in range(predicting)
            ]
        )
        nn.init.normal_(self.embedding.weight, std=STD)
        for layer in self.layers:
            nn.init.normal_(layer.positions, std=STD)

    def _make_head(self):
        return SoftmaxHead(self.embedding.embedding_dim, len(self.dictionary))

    def predicts(self, layer, progress):
        """Whether a layer, counted from 0, has losses when this share of training is done."""
        layers = len(self.layers)
        return layer == layers - 1 or progress < (layer + 1) / (2 * layers)

    def auxiliary_losses(self, done, targets, further_targets=None):
        """What the losses of all layers and targets, put together, are more than the loss of the
        head, which comes with the targets. The difference may be negative where layers are
        averaged."""
        all_targets = [targets, *(() if further_targets is None else further_targets)]
        weights = [1.0, *[self.further_target_weight] * (self.num_targets - 1)]
        padding, progress = self.dictionary.pad(), done.context.progress
        last = len(self.layers) - 1
        own = total = mean_loss(self.head, done.features, targets, padding)
        active = 0
        for i, heads in enumerate(self.classifiers):
            layer, skipped = last - i, int(i == 0)
            uses = self.predicts(layer, progress)
            active += uses
            h = self.layers[layer].norm_attention(done.hidden[layer]) if uses else None
            for k, head in enumerate(heads, skipped):
                if uses and k < len(all_targets):
                    total = total + weights[k] * mean_loss(head, h, all_targets[k], padding)
                else:  # distributed training expects a gradient of every parameter
                    total = total + sum((0 * p).sum() for p in head.parameters())
        if self.averages_layers:
            total = total / active
        return {"auxiliary_loss": total - own}


def mean_loss(head, h, targets, padding):
    """The mean cost of the targets that there are, in nats.

    Args:
        head (SoftmaxHead): what predicts
        h (Tensor): ``[T, B, H]``
        targets (LongTensor): ``[B, T]``
        padding (int): stands for no target
    """
    exists = targets != padding
    losses = head.losses(h.transpose(0, 1), targets).masked_fill(~exists, 0.0)
    return losses.sum() / exists.sum().clamp(min=1)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "n_head", "d_inner", "num_targets")
    require_at_least(0, cfg, "further_target_weight")
    require_heads_that_divide(cfg)
    require_dropouts(cfg, "dropout")
    check_window(cfg)


ARCHITECTURES = {
    # The paper's 44M parameters. It gives the dropout of the deeper model only.
    "t12_enwik8": {"num_layers": Size(12, "paper, T12")},
    # The paper's 235M parameters.
    "t64_enwik8": {},
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "n_head": 2,
        "d_inner": 32,
        "window": 60,
        "eval_stride": 20,
        "dropout": 0.1,
    },
    training="--optimizer adam --lr 0.01 --lr-scheduler cosine --clip-norm 1.0 --random-windows "
    "--criterion cross_entropy_with_auxiliary_losses",
    variants={
        "": {"window": 20, "eval_stride": 5},
        "last layer": {"window": 20, "intermediate_losses": False, "num_targets": 1},
    },
)


@register_family("deep_char_transformer", DeepCharTransformerConfig, ARCHITECTURES, TINY)
class DeepCharTransformer(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        trains = getattr(task, "is_training", False)
        if trains and cfg.intermediate_losses and getattr(task.cfg, "max_update", 1) <= 0:
            raise UserError(
                "--intermediate-losses: those of a layer end after a share of --max-update, which "
                "is missing; give it"
            )
        return cls(DeepCharTransformerDecoder(cfg, task.source_dictionary))
