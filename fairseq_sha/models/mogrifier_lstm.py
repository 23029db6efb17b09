"""The Mogrifier LSTM: G. Melis et al., "Mogrifier LSTM", arXiv 1909.01792; without rounds, the LSTM
that the paper compares it with.

Where paper and published code (github.com/google-deepmind/lamb) differ, the figures are of the
code: the input gate is capped at ``1 - f``, each round of modulation has a bias, and the softmax
reads the sum of all layers' outputs.
"""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from torch import nn

from fairseq_sha.checks import require_at_least, require_dropouts, require_not_negative
from fairseq_sha.models.family import Size, Tiny, register_family
from fairseq_sha.models.l2_penalty import L2Penalty, L2PenaltyConfig
from fairseq_sha.models.segment_decoder import SegmentDecoder, SegmentLanguageModel
from fairseq_sha.ops import Gates, dropout, mogrifier_lstm


@dataclass
class MogrifierLSTMConfig(L2PenaltyConfig):
    width: int = field(
        default=1160,
        metadata={
            "help": "width H of the layers (default: the largest that fits the paper's budget of "
            "48M parameters)"
        },
    )
    embedding_width: int = field(
        default=0, metadata={"help": "width of the embedding; 0 for H (default: published code)"}
    )
    num_layers: int = field(default=4, metadata={"help": "number of layers (default: paper)"})
    rounds: int = field(
        default=6,
        metadata={
            "help": "rounds in which input and state scale each other before each step; 0 for an "
            "LSTM (default: published code)"
        },
    )
    rank: int = field(
        default=79,
        metadata={
            "help": "rank of the matrices of these rounds; 0 for full rank "
            "(default: published code)"
        },
    )
    input_gate: ChoiceEnum(["capped", "coupled", "free"]) = field(
        default="capped",
        metadata={
            "help": "input gate: at most 1 - f (capped), 1 - f (coupled), or free "
            "(default: published code)"
        },
    )
    cell_clip: float = field(
        default=0.0,
        metadata={
            "help": "bound on the absolute values of carried cell states; 0 for none "
            "(default: published code)"
        },
    )
    sum_layers: bool = field(
        default=True,
        metadata={
            "help": "predict from the sum of all layers' outputs, not from the last one's "
            "(default: published code)"
        },
    )
    forget_bias: float = field(
        default=1.0,
        metadata={"help": "mean of the initial biases of forget gates (default: published code)"},
    )
    dropout_input: float = field(
        default=0.0155,
        metadata={"help": "dropout of embedded tokens (default: published code)"},
    )
    dropout_inter_layer: float = field(
        default=0.0086,
        metadata={"help": "dropout of the inputs of all other layers (default: published code)"},
    )
    dropout_state: float = field(
        default=0.0437,
        metadata={
            "help": "dropout of h where it enters the step, with one mask for the whole segment "
            "(default: published code)"
        },
    )
    dropout_output: float = field(
        default=0.1383,
        metadata={"help": "dropout of what the softmax reads (default: published code)"},
    )


class Round(nn.Module):
    """What gives the factors of a round: ``B A y + b``; with rank 0, ``B y + b``."""

    def __init__(self, source, target, rank):
        super().__init__()
        self.down = None
        if rank > 0:
            self.down = nn.Linear(source, rank, bias=False)
        self.up = nn.Linear(rank or source, target)
        nn.init.zeros_(self.up.bias)
        if rank > 0:
            for weight in (self.down.weight, self.up.weight):
                truncated_normal(weight, (source * rank) ** -0.25)
        else:
            truncated_normal(self.up.weight, (1.3 / source) ** 0.5)

    def weights(self):
        """``A``, ``B`` and ``b``."""
        return self.down and self.down.weight, self.up.weight, self.up.bias


class MogrifierLSTMLayer(nn.Module):
    """A layer; its state holds ``h`` and ``c``, ``[1, B, H]``, in float32 or wider.

    Args:
        cfg (MogrifierLSTMConfig): the settings
        input_width (int): ``E``
        dropout_input (float): on the input, which the decoder has not dropped
    """

    recurrence = staticmethod(mogrifier_lstm)

    def __init__(self, cfg, input_width, dropout_input):
        super().__init__()
        self.dropout_input = dropout_input
        self.dropout_state = cfg.dropout_state
        self.gates = Gates(str(cfg.input_gate), cfg.cell_clip)
        width = cfg.width
        self.input = nn.Linear(input_width, self.gates.rows * width)  # rows of j, f, i and o
        self.hidden = nn.Linear(width, self.gates.rows * width, bias=False)
        sizes = (width, input_width)
        self.rounds = nn.ModuleList(
            [Round(sizes[r % 2], sizes[1 - r % 2], cfg.rank) for r in range(cfg.rounds)]
        )
        truncated_normal(self.input.weight, (1.3 / input_width) ** 0.5)
        truncated_normal(self.hidden.weight, (1.3 / width) ** 0.5)
        truncated_normal(self.input.bias, (1.3 / width) ** 0.5)
        self.input.bias.data[width : 2 * width] += cfg.forget_bias

    def forward(self, x, state, context):
        """``x [T, B, E]`` and state to ``h [T, B, H]`` and state."""
        x = dropout(x, self.dropout_input, context.training)
        h0, c0 = (state["h"][0], state["c"][0]) if state else [self.zeros(x)] * 2
        mask = None
        if context.training and self.dropout_state > 0:
            mask = dropout(x.new_ones(h0.shape), self.dropout_state)
        rounds = [maps.weights() for maps in self.rounds]
        weights = self.input.weight, self.hidden.weight, self.input.bias
        out, h, c = self.recurrence(x, h0, c0, *weights, rounds, mask, self.gates)
        # The outputs are not dropped here: the sum of all layers has a dropout of its own.
        return out, {"h": h.unsqueeze(0), "c": c.unsqueeze(0)}

    def zeros(self, x):
        return x.new_zeros(x.size(1), self.hidden.in_features)


class MogrifierLSTMDecoder(L2Penalty, SegmentDecoder):
    """Embedding, layers, and a softmax with weights of its own."""

    def __init__(self, cfg, dictionary):
        check(cfg)
        embedding_width = cfg.embedding_width or cfg.width
        layers = []
        for i in range(cfg.num_layers):
            width, p = (cfg.width, cfg.dropout_inter_layer) if i else (embedding_width, 0.0)
            layers.append(MogrifierLSTMLayer(cfg, width, p))
        super().__init__(
            cfg,
            dictionary,
            layers,
            cfg.width,
            tied=False,
            dropout_input=cfg.dropout_input,
            dropout_output=cfg.dropout_output,
        )
        self.sum_layers = cfg.sum_layers
        self.embedding = nn.Embedding(len(dictionary), embedding_width)
        truncated_normal(self.embedding.weight, (1.3 / embedding_width) ** 0.5)
        truncated_normal(self.head.weight, (1.3 / cfg.width) ** 0.5)
        nn.init.zeros_(self.head.bias)

    def combine(self, hidden, context):
        return sum(hidden) if self.sum_layers else hidden[-1]


def truncated_normal(weight, std):
    """Draw from a normal distribution within two standard deviations. As in the published code,
    ``std`` is that of the distribution before it is cut."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def check(cfg):
    """Raise a UserError for sizes that make no model."""
    require_at_least(1, cfg, "width", "num_layers")
    require_at_least(0, cfg, "embedding_width", "rounds", "rank")
    require_not_negative(cfg, "cell_clip")
    require_dropouts(cfg, "dropout_input", "dropout_inter_layer", "dropout_state", "dropout_output")


def _sizes(width, rounds, rank, input_, inter_layer, state, output, l2):
    """A model of the published code, whose penalty is on a loss that is summed over 500 steps."""
    source = "published code"
    return {
        "width": Size(width, "the largest that fits the paper's budget"),
        "rounds": Size(rounds, source),
        "rank": Size(rank, source),
        "dropout_input": Size(input_, source),
        "dropout_inter_layer": Size(inter_layer, source),
        "dropout_state": Size(state, source),
        "dropout_output": Size(output, source),
        "l2_penalty": Size(l2 / 500, "published code, per token"),
    }


ARCHITECTURES = {
    "melis_lstm_enwik8": _sizes(1218, 0, 0, 0.1628, 0.1195, 0.1037, 0.1386, 2.518e-5),
    "melis_lstm_enwik8_96m": _sizes(1725, 0, 0, 0.123, 0.126, 0.131, 0.248, 5.85e-5),
    "mogrifier_lstm_enwik8": _sizes(1160, 6, 79, 0.0155, 0.0086, 0.0437, 0.1383, 9.934e-4),
    "mogrifier_lstm_enwik8_96m": _sizes(1687, 5, 61, 0.0159, 0.1379, 0.1649, 0.2879, 4.409e-5),
}

TINY = Tiny(
    model={
        "width": 16,
        "num_layers": 2,
        "rounds": 4,
        "rank": 3,
        "dropout_input": 0.1,
        "dropout_inter_layer": 0.1,
        "dropout_state": 0.1,
        "dropout_output": 0.1,
        "l2_penalty": 1e-5,
    },
    training="--optimizer adam --adam-betas (0.0,0.999) --lr 0.02 --clip-norm 1.0 "
    "--criterion cross_entropy_with_auxiliary_losses",
    variants={
        "": {},
        "full rank": {"rank": 0, "input_gate": "coupled", "embedding_width": 12},
        "LSTM": {"rounds": 0, "cell_clip": 0.5, "sum_layers": False},
    },
)


@register_family("mogrifier_lstm", MogrifierLSTMConfig, ARCHITECTURES, TINY)
class MogrifierLSTM(SegmentLanguageModel):
    """The model family."""

    @classmethod
    def build_model(cls, cfg, task):
        return cls(MogrifierLSTMDecoder(cfg, task.source_dictionary))
