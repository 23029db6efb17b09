from fairseq_sha.optim import min_trust_lamb  # noqa: F401
