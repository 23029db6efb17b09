"""SGD with momentum, as fairseq's optimiser."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_sha import UserError
from fairseq_sha.optim.momentum_sgd import FairseqMomentumSGD


def config(**fields):
    return SimpleNamespace(**{"lr": [0.1], "momentum": 0.99, "weight_decay": 0.0, **fields})


def test_steps_follow_the_equations():
    weight = torch.nn.Parameter(torch.randn(5))
    expected, step = weight.detach().clone(), torch.zeros(5)
    optimizer = FairseqMomentumSGD(config(weight_decay=0.01), [weight])
    for _ in range(3):
        gradient = torch.randn(5)
        weight.grad = gradient.clone()
        optimizer.step()
        step = 0.99 * step + gradient + 0.01 * expected
        expected = expected - 0.1 * step
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(momentum=1.0), "--momentum 1.0"),
        (dict(momentum=-0.1), "--momentum -0.1"),
        (dict(weight_decay=-1.0), "--weight-decay"),
        (dict(lr=[-1.0]), "--lr"),
    ],
)
def test_impossible_settings_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        FairseqMomentumSGD(config(**fields), [torch.nn.Parameter(torch.zeros(1))])
