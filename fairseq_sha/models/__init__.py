"""Models. fairseq imports each file of this folder, which registers it."""

from fairseq_sha.models import sha_rnn  # noqa: F401
