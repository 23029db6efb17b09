"""Functions on tensors that need speed. Each equals a slow form that is written out in
:mod:`fairseq_sha.ops.oracles`, which only tests and benchmarks import."""

from fairseq_sha.ops.attention import attend, causal_bias, causal_relative_bias, skew
from fairseq_sha.ops.dropout import dropout
from fairseq_sha.ops.layer_norm_lstm import layer_norm_lstm
from fairseq_sha.ops.linear_recurrence import linear_recurrence
from fairseq_sha.ops.lstm import lstm
from fairseq_sha.ops.masked_softmax import masked_softmax
from fairseq_sha.ops.memory import (
    last_rows,
    next_keys_and_values,
    next_memory,
    remembers_inputs,
    rows_to_attend,
)
from fairseq_sha.ops.mogrifier_lstm import Gates, mogrifier_lstm
from fairseq_sha.ops.recurrent_highway import recurrent_highway
from fairseq_sha.ops.sparse_attention import (
    attend_fixed,
    attend_locally,
    attend_strided,
    attend_to_all,
)
from fairseq_sha.ops.sru import sru

__all__ = [
    "Gates",
    "attend",
    "attend_fixed",
    "attend_locally",
    "attend_strided",
    "attend_to_all",
    "causal_bias",
    "causal_relative_bias",
    "dropout",
    "last_rows",
    "layer_norm_lstm",
    "linear_recurrence",
    "lstm",
    "masked_softmax",
    "mogrifier_lstm",
    "next_keys_and_values",
    "next_memory",
    "recurrent_highway",
    "remembers_inputs",
    "rows_to_attend",
    "skew",
    "sru",
]
