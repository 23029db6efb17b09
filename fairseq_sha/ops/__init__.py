from fairseq_sha.ops.attention import (
    attend,
    attend_reference,
    band,
    causal,
    causal_relative,
    last_rows,
)
from fairseq_sha.ops.dropout import dropout
from fairseq_sha.ops.linear_recurrence import linear_recurrence, linear_recurrence_reference
from fairseq_sha.ops.masked_softmax import masked_softmax, masked_softmax_reference
from fairseq_sha.ops.sru import sru, sru_reference

__all__ = [
    "attend",
    "attend_reference",
    "band",
    "causal",
    "causal_relative",
    "dropout",
    "last_rows",
    "linear_recurrence",
    "linear_recurrence_reference",
    "masked_softmax",
    "masked_softmax_reference",
    "sru",
    "sru_reference",
]
