"""Clipping on the CPU where there is a GPU, too."""

import pytest
import torch
from fairseq import utils


@pytest.mark.parametrize("limit, expected", [(0.5, 0.5), (1e3, 10.0), (0.0, 10.0)])
def test_gradients_on_the_cpu_are_clipped_there(monkeypatch, limit, expected):
    """fairseq would collect their norms on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for param, value in zip(params, ([6.0, 0.0], [0.0, 8.0])):
        param.grad = torch.tensor(value)
    assert float(utils.clip_grad_norm_(iter(params), limit)) == 10
    clipped = torch.cat([param.grad for param in params[:2]])
    assert float(clipped.norm()) == pytest.approx(expected, rel=1e-5)
