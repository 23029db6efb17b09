import pytest
import torch

from fairseq_sha.ops.oracles import clipped_adagrad_reference
from fairseq_sha.optim.clipped_adagrad import (
    ClippedAdagrad,
    ClippedAdagradConfig,
    FairseqClippedAdagrad,
)
from tests.optim.helpers import check_limits_train, check_refused, config, impossible


def random_params():
    shapes = [(7, 5), (11,), (3, 4, 2), ()]
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.double)) for shape in shapes]


@pytest.mark.parametrize("clip", [0.0, 0.03, 1.0])
def test_equals_its_definition(clip):
    params = random_params()
    optimizer = ClippedAdagrad(params, lr=0.07, eps=1e-10, clip=clip)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for step in range(4):
        for i, param in enumerate(params):
            # Norms below and above the bound, and one of exactly zero.
            param.grad = torch.randn_like(param) * 10.0 ** (i - 3) * (step != 2 or i != 1)
            expected[i] = clipped_adagrad_reference(
                expected[i][0], param.grad, expected[i][1], 0.07, 1e-10, clip
            )
        optimizer.step()
        for param, (w, _) in zip(params, expected):
            torch.testing.assert_close(param.detach(), w)


def test_without_clipping_it_is_torch_s_adagrad():
    ours, theirs = random_params(), random_params()
    for a, b in zip(ours, theirs):
        b.data.copy_(a)
    optimizers = ClippedAdagrad(ours, lr=0.1, clip=0), torch.optim.Adagrad(theirs, lr=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_step_is_clipped_and_the_sum_of_squares_is_not():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = ClippedAdagrad([param], lr=1.0, clip=0.03)
    for gradient, expected in ((3.0, -0.03 / 3), (0.01, -0.03 / 3 - 0.01 / (9 + 1e-4) ** 0.5)):
        param.grad = torch.tensor([gradient])
        optimizer.step()
        assert param.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, value", impossible(["adagrad_eps"], ["adagrad_clip"]))
def test_impossible_settings_are_refused(name, value):
    check_refused(FairseqClippedAdagrad, ClippedAdagradConfig, name, value)


@pytest.mark.parametrize(
    "fields",
    [dict(adagrad_eps=1e-30), dict(adagrad_clip=0.0), dict(adagrad_clip=1e-30), dict(lr=[0.0])],
)
def test_settings_at_the_limits_train(fields):
    check_limits_train(FairseqClippedAdagrad, ClippedAdagradConfig, **fields)


def test_flat_parameters_are_refused():
    optimizer = FairseqClippedAdagrad(config(ClippedAdagradConfig), random_params())
    assert not optimizer.supports_flat_params


def test_resumed_run_keeps_its_state_and_takes_settings_from_its_config():
    params = random_params()
    first = FairseqClippedAdagrad(config(ClippedAdagradConfig, adagrad_clip=0.5), params)
    for param in params:
        param.grad = torch.randn_like(param)
    first.step()
    resumed = FairseqClippedAdagrad(config(ClippedAdagradConfig, adagrad_clip=0.25), params)
    resumed.load_state_dict(first.state_dict())
    assert [group["clip"] for group in resumed.param_groups] == [0.25]
    for param in params:
        torch.testing.assert_close(resumed.optimizer.state[param]["total"], param.grad**2)
