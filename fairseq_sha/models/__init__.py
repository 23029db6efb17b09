"""Models. fairseq imports each file of this folder, which registers it."""

from fairseq_sha.models import adaptive_span, sha_rnn, transformer_xl  # noqa: F401
