"""What the tests of several optimisers have in common."""

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha.errors import UserError

# Numbers outside the range of float32 included, which become 0 and infinity there.
NOT_POSITIVE = [0.0, -1.0, 1e-50, 1e39, float("nan"), float("inf")]
NEGATIVE = NOT_POSITIVE[1:]
NOT_BETAS = [[0.9], [0.9, 0.99, 0.999], [0.9, 1.0], [-0.1, 0.9], [0.9, float("nan")]]


def impossible(positive=(), not_negative=(), betas=()):
    """Pairs of a setting and a value with which no training can work, by the kind of setting."""
    return [
        *((name, value) for name in positive for value in NOT_POSITIVE),
        *((name, value) for name in not_negative for value in NEGATIVE),
        *((name, value) for name in betas for value in NOT_BETAS),
        *(("lr", [0.1, value]) for value in NEGATIVE),
    ]


def config(config_class, lr=(0.1,), **fields):
    cfg = OmegaConf.structured(config_class(**fields))
    cfg.lr = list(lr)
    return cfg


def check_refused(optimizer, config_class, name, value):
    """One line that names the option, before there is an optimiser."""
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} .*: [^\n]+$"):
        optimizer(config(config_class, **{name: value}), params)


def check_limits_train(optimizer, config_class, **fields):
    """Settings at the limits of what is accepted leave all weights finite, also those whose
    gradient is 0."""
    param = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = optimizer(config(config_class, **fields), [param])
    for _ in range(8):
        param.grad = torch.randn(6, 4)
        param.grad[3] = 0
        optimizer.step()
    assert param.isfinite().all()
