import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha import UserError
from fairseq_sha.optim.radam import DecoupledRAdam, FairseqRAdam, RAdamConfig


def params():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]


def test_weight_decay_is_decoupled_from_the_step():
    """Weights shrink by lr * decay; what is added to them is RAdam's step without decay."""
    decayed, plain = params(), params()
    ours = DecoupledRAdam(decayed, lr=0.1, shrink=0.3)
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
    DecoupledRAdam([kept, moved], lr=0.1, shrink=0.3).step()
    assert torch.equal(kept, before)


def config(**fields):
    cfg = OmegaConf.structured(RAdamConfig(**fields))
    cfg.lr = [0.1]
    return cfg


def test_resumed_run_keeps_its_state_and_follows_its_own_options():
    own = params()
    first = FairseqRAdam(config(weight_decay=0.5), own)
    for param in own:
        param.grad = torch.ones_like(param)
    first.step()
    resumed = FairseqRAdam(config(weight_decay=0.1), own)
    resumed.load_state_dict(first.state_dict())
    assert [group["shrink"] for group in resumed.param_groups] == [0.1]
    assert all("exp_avg" in resumed.optimizer.state[param] for param in own)


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(radam_betas=[0.9]), "--radam-betas"),
        (dict(radam_eps=-1.0), "--radam-eps"),
        (dict(weight_decay=-1.0), "--weight-decay"),
    ],
)
def test_impossible_settings_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        FairseqRAdam(config(**fields), params())
