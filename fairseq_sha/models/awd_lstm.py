"""AWD-LSTM and AWD-QRNN: S. Merity et al., "Regularizing and Optimizing LSTM Language Models",
arXiv 1708.02182, and "An Analysis of Neural Language Modeling at Multiple Scales",
arXiv 1803.08240."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_not_negative
from fairseq_sha.errors import UserError
from fairseq_sha.models.embeddings import AdaptiveConfig, bands
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.heads import widen
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.modules import LSTM, QRNN
from fairseq_sha.ops import dropout

BOUND = 0.1  # of the uniform initial embedding (published code)


@dataclass
class AWDLSTMConfig(AdaptiveConfig):
    cell: ChoiceEnum(["lstm", "qrnn"]) = field(
        default="lstm", metadata={"help": "recurrent cell: lstm or qrnn (default: paper)"}
    )
    width: int = field(
        default=400,
        metadata={
            "help": "width E of embedding and of the last layer, which share the output's matrix "
            "(default: paper)"
        },
    )
    hidden_width: int = field(
        default=1840,
        metadata={"help": "width of all layers but the last (default: paper, enwik8)"},
    )
    num_layers: int = field(default=3, metadata={"help": "number of layers (default: paper)"})
    qrnn_window: int = field(
        default=2,
        metadata={
            "help": "inputs that each step of the first QRNN layer sees, 1 or 2; further layers "
            "see 1 (default: published code)"
        },
    )
    dropout_embedding: float = field(
        default=0.0,
        metadata={"help": "dropout of whole embedding rows (default: paper, enwik8)"},
    )
    dropout_input: float = field(
        default=0.1,
        metadata={
            "help": "variational dropout of embedded tokens, with one mask for all steps of a "
            "segment (default: paper, enwik8)"
        },
    )
    dropout_hidden: float = field(
        default=0.1,
        metadata={"help": "the same of all layers' outputs but the last (default: paper, enwik8)"},
    )
    dropout_output: float = field(
        default=0.4,
        metadata={"help": "the same of the last layer's output (default: paper, enwik8)"},
    )
    dropout_weight: float = field(
        default=0.2,
        metadata={
            "help": "dropout of single recurrent weights of the LSTM, or of all weights of the "
            "QRNN's map, with one mask for a segment (default: paper, enwik8)"
        },
    )
    activation_penalty: float = field(
        default=0.0,
        metadata={
            "help": "coefficient (alpha) of the mean square of the dropped last output in the "
            "training loss; needs --criterion cross_entropy_with_auxiliary_losses "
            "(default: paper, enwik8)"
        },
    )
    temporal_penalty: float = field(
        default=0.0,
        metadata={
            "help": "coefficient (beta) of the mean square of the last layer's change from step to "
            "step, in the same way (default: paper, enwik8)"
        },
    )


class AWDLSTMLayer(nn.Module):
    """A recurrent cell with dropped weights, and variational dropout of its output."""

    def __init__(self, cell, p):
        super().__init__()
        self.cell = cell
        self.p = p

    def forward(self, h, state, context):
        """``h [T, B, in]`` and state to ``[T, B, out]`` and the cell's new state, which is not
        dropped."""
        h, state = self.cell(h, state, context.training)
        return dropout(h, self.p, context.training, shared=(0,)), state


class AWDLSTMDecoder(SegmentDecoder):
    """Embedding, layers of which the last is as wide as the embedding, tied output."""

    shared_dropout = (0,)

    def __init__(self, cfg, dictionary):
        check(cfg)
        last = cfg.num_layers - 1
        widths = [cfg.width, *[cfg.hidden_width] * last, cfg.width]
        # The last layer's output is dropped as the decoder's: the temporal penalty is of h itself.
        layers = [
            AWDLSTMLayer(cell(cfg, i, *widths[i : i + 2]), cfg.dropout_hidden if i < last else 0.0)
            for i in range(cfg.num_layers)
        ]
        super().__init__(
            dictionary,
            layers,
            cfg.width,
            bands=bands(cfg, dictionary),
            dropout_embedding=cfg.dropout_embedding,
            dropout_input=cfg.dropout_input,
            dropout_output=cfg.dropout_output,
        )
        self.activation_penalty = cfg.activation_penalty
        self.temporal_penalty = cfg.temporal_penalty
        self.has_auxiliary_losses = cfg.activation_penalty > 0 or cfg.temporal_penalty > 0
        # Cells come as torch initialises them. Published code has no projections.
        for name, parameter in self.vocabulary_parameters():
            if "cluster" in name or "bias" in name:
                nn.init.zeros_(parameter)
            elif "weight" in name:
                nn.init.uniform_(parameter, -BOUND, BOUND)

    def auxiliary_losses(self, done, targets, further_targets=None):
        """AR and TAR (arXiv 1708.02182, section 4.6): means over all elements, as in the published
        code; the paper has norms of vectors."""
        losses = {}
        if self.activation_penalty > 0:
            losses["ar_loss"] = self.activation_penalty * widen(done.features).pow(2).mean()
        if self.temporal_penalty > 0:
            change = widen(done.hidden[-1]).diff(dim=0)
            # A segment of one token has no change.
            mean = change.pow(2).sum() / max(1, change.numel())
            losses["tar_loss"] = self.temporal_penalty * mean
        return losses


def cell(cfg, layer, width, hidden_width):
    """The cell of a layer, from its widths of input and output."""
    if str(cfg.cell) == "lstm":
        return LSTM(width, hidden_width, weight_dropout=cfg.dropout_weight)
    window = cfg.qrnn_window if layer == 0 else 1
    return QRNN(width, hidden_width, window, weight_dropout=cfg.dropout_weight)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "hidden_width", "num_layers", "qrnn_window")
    if cfg.qrnn_window > 2:
        raise UserError(f"--qrnn-window {cfg.qrnn_window}: must be 1 or 2")
    kinds = "embedding", "input", "hidden", "output", "weight"
    require_dropouts(cfg, *(f"dropout_{kind}" for kind in kinds))
    require_not_negative(cfg, "activation_penalty", "temporal_penalty")


WIKITEXT2, WIKITEXT103 = "published code, WikiText-2", "published code, WikiText-103"
ARCHITECTURES = {
    # SHA-RNN's README says 44M; the paper and the count of parameters say 47M.
    "awd_lstm_enwik8": {},
    "awd_lstm_wt2": {
        "hidden_width": Size(1150, WIKITEXT2),
        "dropout_embedding": Size(0.1, WIKITEXT2),
        "dropout_input": Size(0.65, WIKITEXT2),
        "dropout_hidden": Size(0.2, WIKITEXT2),
        "dropout_output": Size(0.4, WIKITEXT2),
        "dropout_weight": Size(0.5, WIKITEXT2),
        "activation_penalty": Size(2.0, WIKITEXT2),
        "temporal_penalty": Size(1.0, WIKITEXT2),
    },
    # The paper's 151M parameters are those with a window of 1 in each layer. The published code
    # has a window of 2 in the first, and 154M.
    "awd_qrnn_wt103": {
        "cell": Size("qrnn", "by name"),
        "hidden_width": Size(2500, WIKITEXT103),
        "num_layers": Size(4, WIKITEXT103),
        "cutoffs": Size([2800, 20000, 76000], WIKITEXT103),
        "dropout_output": Size(0.1, WIKITEXT103),
        "dropout_weight": Size(0.0, WIKITEXT103),
    },
}

TINY = Tiny(
    model={
        "width": 16,
        "hidden_width": 24,
        "num_layers": 2,
        "dropout_embedding": 0.05,
        "dropout_input": 0.05,
        "dropout_hidden": 0.05,
        "dropout_output": 0.05,
        "dropout_weight": 0.05,
        "activation_penalty": 0.02,
        "temporal_penalty": 0.01,
    },
    training="--optimizer adam --lr 0.02 --lr-scheduler fixed --clip-norm 0.25 "
    "--criterion cross_entropy_with_auxiliary_losses",
    variants={
        "lstm": {},
        "qrnn": {"cell": "qrnn"},
        "adaptive": {"cell": "qrnn", "cutoffs": [7, 15]},
    },
)


@register_family("awd_lstm", AWDLSTMConfig, ARCHITECTURES, TINY)
class AWDLSTM(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(AWDLSTMDecoder(cfg, task.source_dictionary))
