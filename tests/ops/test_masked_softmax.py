import torch

from fairseq_sha.ops import masked_softmax
from fairseq_sha.ops.oracles import masked_softmax_reference


def inputs():
    scores = torch.randn(2, 3, 4, 6, dtype=torch.double) * 3
    scores[..., 0] = float("-inf")  # outside the window
    mask = torch.rand(3, 4, 6, dtype=torch.double)
    mask[1] = 0  # a head that reaches nothing
    mask[2] = 1e-9  # where what keeps the quotient finite counts
    return scores.requires_grad_(), mask.requires_grad_()


def test_equals_the_form_written_out_in_value_and_gradient():
    scores, mask = inputs()
    actual, expected = masked_softmax(scores, mask), masked_softmax_reference(scores, mask)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), [scores, mask]),
        torch.autograd.grad((expected * weight).sum(), [scores, mask]),
    )


def test_gradients_are_those_of_finite_differences():
    scores = torch.randn(2, 3, 2, 4, dtype=torch.double, requires_grad=True)
    mask = torch.rand(3, 2, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(masked_softmax, (scores, mask))


def test_half_precision_divides_by_no_zero():
    scores = torch.tensor([[[[40.0, 0.0]]]], dtype=torch.float16)
    mask = torch.tensor([[[0.0, 1.0]]])  # what is left has a weight of e^-40
    weights = masked_softmax(scores, mask)
    assert weights.dtype == torch.float16 and torch.equal(weights, torch.zeros_like(weights))


def test_weights_sum_to_one_where_something_is_reached():
    scores, mask = inputs()
    sums = masked_softmax(scores, mask).sum(-1)
    torch.testing.assert_close(sums[:, 0], torch.ones_like(sums[:, 0]))
    assert not sums[:, 1].any()
