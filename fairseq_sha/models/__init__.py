"""Models. fairseq imports each file of this folder, which registers it."""

from fairseq_sha.models import (  # noqa: F401
    adaptive_span,
    min_rnn,
    sha_rnn,
    srupp,
    transformer_xl,
)
