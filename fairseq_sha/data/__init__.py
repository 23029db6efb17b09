from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.data.segment_iterator import SegmentIterator
from fairseq_sha.data.segments import SegmentDataset, SegmentId, segment_lengths, stream_bounds

__all__ = [
    "ByteDictionary",
    "Corpus",
    "SegmentDataset",
    "SegmentId",
    "SegmentIterator",
    "segment_lengths",
    "stream_bounds",
]
