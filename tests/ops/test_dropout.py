import pytest
import torch

from fairseq_sha.ops import dropout
from fairseq_sha.ops.dropout import _dropout_by_torch


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


# torch's own dropout, which draws on a GPU, runs on the CPU too.
FORMS = {"on the CPU": dropout, "by torch": _dropout_by_torch}


@pytest.fixture(params=FORMS)
def form(request):
    return lambda x, p, shared=(): FORMS[request.param](x, p, shared=shared)


@pytest.mark.parametrize("shared, same", [((0,), 0), ((1,), 1), ((-1,), 2)])
def test_a_mask_is_shared_along_a_dimension(form, shared, same):
    shape = [40, 50, 60]
    x = torch.randn(shape)
    dropped = form(x, 0.3, shared)
    kept = dropped != 0
    first = kept.narrow(same, 0, 1)
    assert torch.equal(kept, first.expand(shape))
    assert first.float().mean() == pytest.approx(0.7, abs=0.04)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7, rtol=1e-4, atol=0)
    others = [dimension for dimension in range(3) if dimension != same]
    assert all(first.float().mean(dimension).std() > 0 for dimension in others)


def test_a_mask_may_be_shared_along_several_dimensions(form):
    dropped = form(torch.ones(8, 1000, 9), 0.5, (0, 2))
    assert (dropped == dropped[:1, :, :1]).all()
    assert (dropped != 0).float().mean() == pytest.approx(0.5, abs=0.06)


def test_shared_masks_differ_from_call_to_call_and_follow_torch_s_seed(form):
    x = torch.ones(3, 1000)
    torch.manual_seed(3)
    first = form(x, 0.5, (0,))
    assert not torch.equal(first, form(x, 0.5, (0,)))
    torch.manual_seed(3)
    assert torch.equal(first, form(x, 0.5, (0,)))


@pytest.mark.parametrize("shared", [(), (0,)])
def test_gradient_is_scaled_where_kept_and_zero_elsewhere(form, shared):
    x = torch.randn(50, 7, dtype=torch.double, requires_grad=True)
    y = form(x, 0.4, shared)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shared_masks_keep_the_type(form, dtype):
    assert form(torch.ones(10, 2, dtype=dtype), 0.5, (0,)).dtype == dtype


def test_without_dropout_shared_dimensions_do_not_matter():
    x = torch.randn(5, 3)
    assert dropout(x, 0.0, shared=(0,)) is x
    assert dropout(x, 0.5, training=False, shared=(0,)) is x
    assert dropout(torch.empty(0, 3), 0.5, shared=(0,)).shape == (0, 3)
