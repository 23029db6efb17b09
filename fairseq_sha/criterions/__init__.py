from fairseq_sha.criterions import cross_entropy_with_auxiliary_losses  # noqa: F401
