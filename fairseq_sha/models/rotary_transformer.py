"""A decoder-only Transformer as it is trained today. It is assembled from:

* pre-norm residual layers, whose initial weights shrink with the depth: A. Radford et al.,
  "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3
* rotary position embeddings: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position
  Embedding", arXiv 2104.09864
* SwiGLU feed-forward layers: N. Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202
* RMSNorm (arXiv 1910.07467) and no biases: H. Touvron et al., "LLaMA", arXiv 2302.13971

What a position sees depends on the use:

* In training, all of its segment up to itself. Each segment is on its own, unless ``memory`` says
  how many tokens before the segment are seen too. Their keys and values are kept as they were;
  Transformer-XL keeps inputs and projects them with the weights of now.
* In carried evaluation, scoring, compression and generation, itself and the ``eval_memory`` tokens
  before it, wherever segments begin. Layers carry keys and values of these tokens.
* In evaluation by sliding windows (``--context-window``), its window up to itself. Each window is
  on its own, as segments in training are.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_heads_that_divide
from fairseq_sha.errors import UserError
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.segment_decoder import Context, SegmentDecoder, SegmentLanguageModel
from fairseq_sha.ops import attend, causal_bias, dropout, next_keys_and_values

STD = 0.02  # of initial weights (GPT-2)
EPS = 1e-6  # of norms (LLaMA)


@dataclass
class RotaryTransformerConfig(FairseqDataclass):
    width: int = field(
        default=512,
        metadata={
            "help": "width H of embedding and layers "
            "(default: chosen here, for 41M, as 12 layers of Transformer-XL)"
        },
    )
    num_layers: int = field(default=12, metadata={"help": "number of layers (default: as width)"})
    n_head: int = field(
        default=8, metadata={"help": "heads of each layer (default: chosen here, 64 wide each)"}
    )
    d_inner: int = field(
        default=1536,
        metadata={
            "help": "inner width of feed-forward layers, which have three matrices "
            "(default: chosen here, 3 H)"
        },
    )
    rotary_base: float = field(
        default=10000.0,
        metadata={
            "help": "pair i of the d / 2 pairs of a head turns by base^(-2 i / d) per token "
            "(default: paper of rotary positions)"
        },
    )
    memory: int = field(
        default=0,
        metadata={
            "help": "in training: tokens before the segment that are attended to "
            "(default: none, as in GPT-2)"
        },
    )
    eval_memory: int = field(
        default=511,
        metadata={
            "help": "at evaluation: tokens before itself that each attends to; with training "
            "segments of N tokens, distances up to N - 1 are learned "
            "(default: chosen here, for segments of 512)"
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "dropout of embedded tokens, attention weights and the outputs of sublayers "
            "(default: none, as in LLaMA)"
        },
    )


@dataclass(frozen=True)
class RotaryContext(Context):
    """What all layers share."""

    #: Cosines and sines of the angles by which the pairs of a head turn, ``[K, 1, d / 2]`` in
    #: float32, one row for each position of memory and segment.
    cos: torch.Tensor = None
    sin: torch.Tensor = None


def angles(positions, width, base):
    """The angles of rotary positions (section 3.2.2).

    Args:
        positions (Tensor): ``[K]``
        width (int): ``d``, of a head
        base (float)

    Returns:
        Tensor ``[K, d / 2]``, float32
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float) / width
    return positions.float().unsqueeze(1) * base**-exponents


def rotate(x, cos, sin):
    """Turn each pair of neighbouring numbers (section 3.4.2): ``x [K, N, d]`` to the same."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    # Where x is of half precision, the products are of single precision.
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return turned.flatten(-2).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention in which a score depends on the distance of query and key only."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.p = cfg.dropout
        self.memory = cfg.memory
        self.eval_memory = cfg.eval_memory
        self.query_key_value = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.output = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds ``keys`` and ``values`` of the
        last tokens, ``[rows, B, H]``. It is empty where each segment is on its own.

        Remembered keys have not been turned. So they are turned by their positions in memory and
        segment together, and no position grows with the text: only differences matter.
        """
        training = context.training
        q, k, v = self.query_key_value(h).chunk(3, -1)
        remembered, new_state = self.memory if training else self.eval_memory, {}
        if remembered > 0:
            _, new_state = next_keys_and_values(state, (k, v), remembered)
        if state:
            k, v = torch.cat([state["keys"], k]), torch.cat([state["values"], v])
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).flatten(1, 2) for x in (q, k, v))
        first = k.size(0) - q.size(0)
        q = rotate(q, context.cos[first:], context.sin[first:])
        k = rotate(k, context.cos, context.sin)
        seen = None if training else self.eval_memory + 1
        p = self.p if training else 0.0
        if not state and p == 0 and (training or len(h) <= seen):
            mix = attend_causally(q, k, v)
        else:
            mix = attend(q, k, v, causal_bias(q, k, seen), p)
        return self.output(mix.unflatten(1, (-1, self.n_head)).flatten(2)), new_state


def attend_causally(queries, keys, values):
    """Attention of each position to those up to itself: three times ``[T, N, d]`` to one. Torch's
    kernels leave out the half of the scores that no position may see."""
    inputs = (x.transpose(0, 1).unsqueeze(1) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(*inputs, is_causal=True).squeeze(1).transpose(0, 1)


class SwiGLU(nn.Module):
    """``W_2 (swish(W h) * V h)``, section 2"""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * inner, bias=False)  # rows: W, V
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, h):
        """``[..., H] -> [..., H]``"""
        gate, value = self.gate_and_value(h).chunk(2, -1)
        return self.output(F.silu(gate) * value)


class RotaryTransformerLayer(nn.Module):
    """Attention, then a feed-forward layer, each pre-normalised and residual."""

    def __init__(self, cfg):
        super().__init__()
        self.p = cfg.dropout
        self.norm_attention = nn.RMSNorm(cfg.width, eps=EPS)
        self.attention = RotaryAttention(cfg)
        self.norm_feed_forward = nn.RMSNorm(cfg.width, eps=EPS)
        self.feed_forward = SwiGLU(cfg.width, cfg.d_inner)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same, see :class:`RotaryAttention`."""
        attended, state = self.attention(self.norm_attention(h), state, context)
        h = h + dropout(attended, self.p, context.training)
        wide = self.feed_forward(self.norm_feed_forward(h))
        return h + dropout(wide, self.p, context.training), state


class RotaryTransformerDecoder(SegmentDecoder):
    """Embedding, layers, a last norm, tied output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [RotaryTransformerLayer(cfg) for _ in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            dropout_input=cfg.dropout,
            final_norm=nn.RMSNorm(cfg.width, eps=EPS),
        )
        self.head_width = cfg.width // cfg.n_head
        self.rotary_base = cfg.rotary_base
        self.longest_window = cfg.eval_memory + 1
        self.has_training_state = cfg.memory > 0
        nn.init.normal_(self.embedding.weight, std=STD)
        for name, parameter in self.layers.named_parameters():
            if name.endswith("output.weight"):  # what is added to the residual stream
                nn.init.normal_(parameter, std=STD / (2 * cfg.num_layers) ** 0.5)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=STD)

    def prepare(self, h, state, context):
        remembered = state[0]["keys"].size(0) if state[0] else 0
        positions = torch.arange(remembered + h.size(0), device=h.device)
        turns = angles(positions, self.head_width, self.rotary_base).unsqueeze(1)
        return RotaryContext(**vars(context), cos=turns.cos(), sin=turns.sin())


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "n_head", "d_inner", "eval_memory")
    require_at_least(0, cfg, "memory")
    require_at_least(1, cfg, "rotary_base")
    require_heads_that_divide(cfg)
    if cfg.width // cfg.n_head % 2:
        raise UserError(
            f"--n-head {cfg.n_head}: makes heads {cfg.width // cfg.n_head} wide; rotary positions "
            "turn pairs, so choose one that makes it even"
        )
    require_dropouts(cfg, "dropout")


# All sizes are chosen here; the papers have no models of bytes.
ARCHITECTURES = {
    # 41M parameters, as many as 12 layers of Transformer-XL.
    "rotary_transformer_enwik8_12l": {},
    # 3.5M, as the models of examples/head_to_head.
    "rotary_transformer_small": {
        "width": Size(256, "chosen here, for 3.5M"),
        "num_layers": Size(4, "chosen here, for 3.5M"),
        "n_head": Size(4, "chosen here, 64 wide each"),
        "d_inner": Size(768, "chosen here, 3 H"),
    },
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "n_head": 2,
        "d_inner": 32,
        "eval_memory": 39,
        "dropout": 0.1,
    },
    training="--optimizer adam --weight-decay 0.1 --lr 0.02 --lr-scheduler cosine --clip-norm 1.0",
    variants={"": {"eval_memory": 9}, "memory": {"eval_memory": 9, "memory": 9}},
)


@register_family("rotary_transformer", RotaryTransformerConfig, ARCHITECTURES, TINY)
class RotaryTransformer(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(RotaryTransformerDecoder(cfg, task.source_dictionary))
