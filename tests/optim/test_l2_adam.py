"""Adam with L2 regularisation, and what fairseq makes of its settings."""

import pytest
import torch

from fairseq_sha.optim.l2_adam import FairseqL2Adam, L2AdamConfig
from tests.optim.helpers import check_limits_train, check_refused, config, impossible


def test_decay_is_a_part_of_the_gradient():
    """Adam written out, with the decay in both moments."""
    param = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.double))
    cfg = config(L2AdamConfig, lr=(0.01,), weight_decay=0.3, l2_adam_betas=[0.8, 0.95])
    optimizer, w = FairseqL2Adam(cfg, [param]), param.detach().clone()
    m = v = torch.zeros_like(w)
    for step in range(1, 6):
        param.grad = torch.randn_like(w)
        g = param.grad + 0.3 * w
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w - 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
        torch.testing.assert_close(param.detach(), w)


@pytest.mark.parametrize(
    "name, value", impossible(["l2_adam_eps"], ["weight_decay"], ["l2_adam_betas"])
)
def test_impossible_settings_are_named(name, value):
    check_refused(FairseqL2Adam, L2AdamConfig, name, value)


def test_settings_at_the_limits_train():
    check_limits_train(FairseqL2Adam, L2AdamConfig, l2_adam_betas=[0.0, 0.0], l2_adam_eps=1e-30)
