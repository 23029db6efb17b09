from fairseq_sha.ops.attention import attend, attend_reference, band, causal, causal_relative
from fairseq_sha.ops.dropout import dropout
from fairseq_sha.ops.masked_softmax import masked_softmax, masked_softmax_reference

__all__ = [
    "attend",
    "attend_reference",
    "band",
    "causal",
    "causal_relative",
    "dropout",
    "masked_softmax",
    "masked_softmax_reference",
]
