"""Tasks. fairseq imports each file of this folder, which registers it."""

from fairseq_sha.tasks import byte_language_modeling  # noqa: F401
