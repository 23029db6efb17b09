from fairseq_sha.optim import (  # noqa: F401
    clipped_adagrad,
    cosine_annealing,
    l2_adam,
    min_trust_lamb,
    momentum_sgd,
    radam,
)
