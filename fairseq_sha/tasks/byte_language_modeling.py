"""Byte-level language modeling: the score is in bits per byte."""

from dataclasses import dataclass

from fairseq.logging import metrics
from fairseq.tasks import register_task

from fairseq_sha.data import ByteDictionary
from fairseq_sha.tasks.segment_language_modeling import (
    SegmentLanguageModelingConfig,
    SegmentLanguageModelingTask,
)


@dataclass
class ByteLanguageModelingConfig(SegmentLanguageModelingConfig):
    pass


@register_task("byte_language_modeling", dataclass=ByteLanguageModelingConfig)
class ByteLanguageModelingTask(SegmentLanguageModelingTask):
    """Segments of bytes. Logs ``bpc``, the mean cost of a byte in bits."""

    @classmethod
    def load_dictionary(cls, filename):
        return ByteDictionary.load(filename)

    def is_no_text(self, tokens):
        # An unknown byte would be scored as if there were a symbol for all that are unknown.
        return super().is_no_text(tokens) | (tokens == self.dictionary.unk())

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        # fairseq's losses are base 2, and every token is a byte. nll_loss is the one without
        # whatever a criterion adds.
        metrics.log_derived(
            "bpc",
            lambda meters: round(
                float(meters["nll_loss" if "nll_loss" in meters else "loss"].avg), 4
            ),
        )
