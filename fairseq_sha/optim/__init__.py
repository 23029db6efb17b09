from fairseq_sha.optim import clipped_adagrad, min_trust_lamb, radam  # noqa: F401
