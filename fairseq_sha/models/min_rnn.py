"""minGRU and minLSTM: L. Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts
from fairseq_sha.errors import UserError
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import FeedForward, MinGRU, MinLSTM
from fairseq_sha.ops import dropout

CELLS = {"min_gru": MinGRU, "min_lstm": MinLSTM}
STD = 0.02  # of the initial embedding, which the output shares; chosen here


@dataclass
class MinRNNConfig(FairseqDataclass):
    cell: ChoiceEnum(list(CELLS)) = field(
        default="min_gru", metadata={"help": "min_gru or min_lstm (default: the simpler)"}
    )
    width: int = field(
        default=1024,
        metadata={"help": "width H of embedding and layers (default: chosen here, for 53M)"},
    )
    num_layers: int = field(
        default=4, metadata={"help": "number of blocks (default: chosen here, as in SHA-RNN)"}
    )
    expansion: float = field(
        default=1.5,
        metadata={
            "help": "width of the recurrent state in multiples of H, rounded down "
            "(default: paper's code for language modelling)"
        },
    )
    conv_width: int = field(
        default=4,
        metadata={
            "help": "tokens that the causal convolution before the recurrence sees, including the "
            "current one; 0 for no convolution (default: paper, appendix)"
        },
    )
    d_inner: int = field(
        default=4096,
        metadata={
            "help": "inner width of feed-forward layers (default: the paper's 4 H at the default H)"
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "dropout of embedded tokens and of what recurrence and feed-forward layer add "
            "(default: none)"
        },
    )


class CausalConvolution(nn.Module):
    """A depthwise convolution over the last ``size`` tokens.

    Its state holds ``conv``: the inputs that the next segment's first outputs see,
    ``[size - 1, B, H]``, zeros at a start.
    """

    def __init__(self, width, size):
        super().__init__()
        self.size = size
        self.conv = nn.Conv1d(width, width, size, groups=width)

    def forward(self, x, state):
        """``x [T, B, H]`` and state to the same."""
        before = state["conv"] if state else x.new_zeros(self.size - 1, *x.shape[1:])
        seen = torch.cat([before, x])
        out = self.conv(seen.permute(1, 2, 0)).permute(2, 0, 1)
        return out, {"conv": seen[len(seen) - self.size + 1 :].clone()}


class MinRNNBlock(nn.Module):
    """Convolution and recurrence, then a feed-forward layer, each pre-normalised and residual."""

    def __init__(self, cfg):
        super().__init__()
        self.p = cfg.dropout
        self.norm = nn.RMSNorm(cfg.width, eps=1e-6)
        self.convolution = None
        if cfg.conv_width > 0:
            self.convolution = CausalConvolution(cfg.width, cfg.conv_width)
        self.cell = CELLS[str(cfg.cell)](cfg.width, cfg.expansion)
        self.norm_feed_forward = nn.RMSNorm(cfg.width, eps=1e-6)
        self.feed_forward = FeedForward(cfg.width, cfg.d_inner, 0.0, F.gelu)

    def forward(self, h, state, context):
        """``h [T, B, H]`` and state to the same. The state holds the cell's state and the
        convolution's."""
        x, conv_state = self.norm(h), {}
        if self.convolution is not None:
            x, conv_state = self.convolution(x, state)
        x, cell_state = self.cell(x, state)
        h = h + dropout(x, self.p, context.training)
        wide = self.feed_forward(self.norm_feed_forward(h), context.training)
        return h + dropout(wide, self.p, context.training), {**conv_state, **cell_state}


class MinRNNDecoder(SegmentDecoder):
    """Embedding, blocks, a last norm, tied output."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        layers = [MinRNNBlock(cfg) for _ in range(cfg.num_layers)]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            dropout_input=cfg.dropout,
            final_norm=nn.RMSNorm(cfg.width, eps=1e-6),
        )
        nn.init.normal_(self.embedding.weight, std=STD)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers", "d_inner")
    require_at_least(0, cfg, "conv_width")
    if not cfg.expansion * cfg.width >= 1:
        raise UserError(
            f"--expansion {cfg.expansion}: the recurrent state of a layer of --width {cfg.width} "
            "would be empty; raise one of them"
        )
    require_dropouts(cfg, "dropout")


ARCHITECTURES = {
    # About the size of SHA-RNN on enwik8. The paper has no such models.
    "min_gru_enwik8": {},
    "min_lstm_enwik8": {"cell": Size("min_lstm", "by name")},
}

TINY = Tiny(
    model={"width": 16, "num_layers": 2, "cell": "min_lstm", "d_inner": 32, "dropout": 0.1},
    training="--optimizer adam --lr 0.03 --lr-scheduler cosine --clip-norm 1.0",
    variants={cell: {"cell": cell} for cell in CELLS},
)


@register_family("min_rnn", MinRNNConfig, ARCHITECTURES, TINY)
class MinRNN(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(MinRNNDecoder(cfg, task.source_dictionary))
