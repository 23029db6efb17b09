"""Byte-level language modeling: the score is in bits per byte."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.tasks import register_task

from fairseq_sha.tasks.segment_language_modeling import (
    SegmentLanguageModelingConfig,
    SegmentLanguageModelingTask,
)


@dataclass
class ByteLanguageModelingConfig(SegmentLanguageModelingConfig):
    codec: ChoiceEnum(["bytes"]) = field(
        default="bytes", metadata={"help": "what the tokens of the data folder stand for"}
    )


@register_task("byte_language_modeling", dataclass=ByteLanguageModelingConfig)
class ByteLanguageModelingTask(SegmentLanguageModelingTask):
    """``segment_language_modeling --codec bytes``. Also logs bits per byte as ``bpc``, bits per
    character, the name under which results on enwik8 are published."""

    def _metrics(self, criterion):
        return [*super()._metrics(criterion), "bpc"]

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        # fairseq's losses are base 2, and every token is a byte.
        metrics.log_derived(
            "bpc",
            lambda meters: round(
                float(meters["nll_loss" if "nll_loss" in meters else "loss"].avg), 4
            ),
        )
