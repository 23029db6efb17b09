"""Cross-entropy, and whatever else the training of a model minimises."""

import math

from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics


@register_criterion("cross_entropy_with_auxiliary_losses", dataclass=CrossEntropyCriterionConfig)
class CrossEntropyWithAuxiliaryLosses(CrossEntropyCriterion):
    """The losses of a model's head plus its auxiliary losses
    (:meth:`~fairseq_sha.models.segment_decoder.SegmentDecoder.auxiliary_losses`).

    The head computes the losses of the targets, so that no logits of the whole vocabulary are made
    if it can do without them. Auxiliary losses exist in training only and are in nats per target.
    Each is logged under its name in bits, as all losses are; the model's statistics are logged as
    they are. ``nll_loss`` is the cross-entropy alone; in evaluation ``loss`` is the same.
    """

    def forward(self, model, sample, reduce=True):
        targets = sample["target"]
        losses, extra = model(**sample["net_input"], targets=targets)
        losses = losses.masked_fill(targets == self.padding_idx, 0.0)
        loss = losses.sum() if reduce else losses.flatten()
        ntokens, nsentences = sample["ntokens"], targets.size(0)
        sample_size = nsentences if self.sentence_avg else ntokens
        logging_output = {"nll_loss": loss.data}
        for name, value in extra.get("auxiliary_losses", {}).items():
            loss = loss + value * ntokens
            logging_output[name] = value.data * ntokens / math.log(2)
        for name, value in extra.get("statistics", {}).items():
            logging_output[name] = value * ntokens
        logging_output.update(
            loss=loss.data, ntokens=ntokens, nsentences=nsentences, sample_size=sample_size
        )
        return loss, sample_size, logging_output

    @staticmethod
    def reduce_metrics(logging_outputs):
        """Log the mean per token of everything except ``loss``, which is divided by what the
        gradient is divided by."""
        totals = {}
        for output in logging_outputs:
            for name, value in output.items():
                totals[name] = totals.get(name, 0) + value
        ntokens, sample_size = totals["ntokens"], totals["sample_size"]
        for name, count in (("loss", sample_size), ("nll_loss", ntokens)):
            metrics.log_scalar(name, totals.pop(name) / count / math.log(2), count, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        for name in sorted(set(totals) - {"ntokens", "nsentences", "sample_size"}):
            metrics.log_scalar(name, totals[name] / ntokens, ntokens, priority=460, round=4)
