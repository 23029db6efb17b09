from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.data.segment_iterator import SegmentIterator, check_symbols
from fairseq_sha.data.segments import SegmentDataset, SegmentId, segment_lengths, stream_bounds

__all__ = [
    "ByteDictionary",
    "Corpus",
    "SegmentDataset",
    "SegmentId",
    "SegmentIterator",
    "check_symbols",
    "segment_lengths",
    "stream_bounds",
]
