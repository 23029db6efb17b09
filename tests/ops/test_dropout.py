import pytest
import torch

from fairseq_sha.ops import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1_000_003,), (100, 100, 100)])
def test_drops_the_share_asked_for_and_keeps_the_mean(p, shape):
    dropped = dropout(torch.ones(shape), p)
    zero = dropped == 0
    assert zero.float().mean() == pytest.approx(p, abs=0.003)
    assert dropped[~zero].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-3)
    assert dropped.mean() == pytest.approx(1, abs=0.02)


def test_elements_are_independent():
    """Four elements share one random number: none of them may depend on another or be biased."""
    zero = (dropout(torch.ones(400_000), 0.3) == 0).float().view(-1, 4)
    assert zero.mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.01)
    correlation = torch.corrcoef(zero.t())
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def test_gradient_falls_on_what_was_kept():
    x = torch.randn(50, 7, dtype=torch.double, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_follows_torch_seed():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    assert not torch.equal(first, dropout(x, 0.5))
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_type(dtype):
    assert dropout(torch.ones(10, dtype=dtype), 0.5).dtype == dtype


def test_identity_where_nothing_is_dropped():
    x = torch.randn(5)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x


def test_nothing_is_nothing():
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
