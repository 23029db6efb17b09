from copy import deepcopy

import pytest
import torch

from fairseq_sha.errors import UserError
from fairseq_sha.optim.radam import FairseqRAdam, RAdamConfig
from tests.optim.helpers import check_limits_train, check_refused, config, impossible


def params():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]


def test_weight_decay_is_decoupled_from_the_step():
    """Weights are multiplied by 1 - lr * decay; then comes RAdam's step without decay."""
    decayed, plain = params(), params()
    ours = FairseqRAdam(config(RAdamConfig, lr=[0.1], weight_decay=0.3), decayed)
    theirs = torch.optim.RAdam(plain, lr=0.1)
    for _ in range(8):  # RAdam rectifies from the sixth on
        for a, b in zip(decayed, plain):
            b.data.copy_(a * (1 - 0.1 * 0.3))
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        for a, b in zip(decayed, plain):
            torch.testing.assert_close(a, b)


def test_parameters_without_gradient_stay():
    kept, moved = params()
    moved.grad = torch.ones_like(moved)
    before = kept.detach().clone()
    FairseqRAdam(config(RAdamConfig, lr=[0.1], weight_decay=0.3), [kept, moved]).step()
    assert torch.equal(kept, before)


def test_resumed_run_keeps_its_state_and_takes_settings_from_its_config():
    own = params()
    first = FairseqRAdam(config(RAdamConfig, weight_decay=0.5), own)
    for param in own:
        param.grad = torch.ones_like(param)
    first.step()
    resumed = FairseqRAdam(config(RAdamConfig, weight_decay=0.1), own)
    resumed.load_state_dict(first.state_dict())
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.1]
    assert all("exp_avg" in resumed.optimizer.state[param] for param in own)


def test_checkpoint_that_names_the_decay_shrink_goes_on_with_the_configs_decay():
    """Earlier versions of this package kept it under a name of its own, beside torch's, which
    was 0 and not decoupled."""
    own, copies = params(), params()
    cfg = config(RAdamConfig, lr=[0.1], weight_decay=0.5)
    first, resumed = FairseqRAdam(cfg, own), FairseqRAdam(cfg, copies)

    def update(optimizer, parameters):
        for i, param in enumerate(parameters):
            param.grad = torch.full_like(param, 1.0 + i)
        optimizer.step()

    update(first, own)
    state = deepcopy(first.state_dict())
    for group in state["param_groups"]:
        group["shrink"] = group["weight_decay"]
        group.update(weight_decay=0, decoupled_weight_decay=False)
    for param, copy in zip(own, copies):
        copy.data.copy_(param)
    resumed.load_state_dict(state)
    for _ in range(7):  # RAdam rectifies from the sixth update on
        update(first, own)
        update(resumed, copies)
    assert all(map(torch.equal, own, copies))


@pytest.mark.parametrize(
    "name, value", impossible(["radam_eps"], ["weight_decay"], ["radam_betas"])
)
def test_impossible_settings_are_refused(name, value):
    check_refused(FairseqRAdam, RAdamConfig, name, value)


def test_weight_decay_that_turns_the_sign_of_weights_is_refused():
    with pytest.raises(UserError, match="--weight-decay 10.0: times --lr 0.1 it must be below 1"):
        FairseqRAdam(config(RAdamConfig, lr=[0.05, 0.1], weight_decay=10.0), params())


@pytest.mark.parametrize(
    "fields",
    [dict(radam_eps=1e-30), dict(radam_betas=[0.0, 0.0]), dict(weight_decay=9.9), dict(lr=[0.0])],
)
def test_settings_at_the_limits_train(fields):
    check_limits_train(FairseqRAdam, RAdamConfig, **fields)


def test_flat_parameters_of_fp16():
    """Each number has a step of its own."""
    assert FairseqRAdam(config(RAdamConfig), params()).supports_flat_params
