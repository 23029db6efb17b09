"""A penalty on the size of all weights as a part of the loss, as in published recipes that clip the
gradient of both together."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass

from fairseq_sha.checks import require_not_negative


@dataclass
class L2PenaltyConfig(FairseqDataclass):
    l2_penalty: float = field(
        default=0.0,
        metadata={
            "help": "coefficient of half the sum of the squares of all weights in the training "
            "loss, in nats per token; needs --criterion cross_entropy_with_auxiliary_losses "
            "(default: none)"
        },
    )


class L2Penalty:
    """A decoder whose loss has the penalty: the first base class, before
    :class:`~fairseq_sha.models.segment_decoder.SegmentDecoder`.

    Args:
        cfg (L2PenaltyConfig): the settings
        *args, **kwargs: for the decoder
    """

    def __init__(self, cfg, *args, **kwargs):
        require_not_negative(cfg, "l2_penalty")
        super().__init__(*args, **kwargs)
        self.l2_penalty = cfg.l2_penalty
        self.has_auxiliary_losses = cfg.l2_penalty > 0

    def auxiliary_losses(self, done, targets, further_targets=None):
        if self.l2_penalty == 0:
            return {}
        squares = sum(parameter.float().pow(2).sum() for parameter in self.parameters())
        return {"l2_loss": self.l2_penalty / 2 * squares}
