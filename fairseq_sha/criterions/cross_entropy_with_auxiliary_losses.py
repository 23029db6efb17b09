"""Cross-entropy and whatever else a model's training must keep small."""

import math

from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics


@register_criterion("cross_entropy_with_auxiliary_losses", dataclass=CrossEntropyCriterionConfig)
class CrossEntropyWithAuxiliaryLosses(CrossEntropyCriterion):
    """fairseq's cross_entropy plus the ``auxiliary_losses`` that the model's output holds beside
    the logits (:meth:`~fairseq_sha.models.segment_decoder.SegmentDecoder.extra`).

    Those are given in training only and in nats per prediction. Each is logged by its name in bits,
    as all losses are, and each of the model's ``statistics`` as it is. ``nll_loss`` is the
    cross-entropy alone; in evaluation ``loss`` is the same.
    """

    def forward(self, model, sample, reduce=True):
        net_output = model(**sample["net_input"])
        loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        ntokens, nsentences = sample["ntokens"], sample["target"].size(0)
        sample_size = nsentences if self.sentence_avg else ntokens
        extra = net_output[1] if isinstance(net_output[1], dict) else {}
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
        """Log means over tokens, but of ``loss`` over what the gradient is divided by."""
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
