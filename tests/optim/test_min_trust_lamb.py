import sys

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha.ops.oracles import min_trust_lamb_reference
from fairseq_sha.optim.min_trust_lamb import (
    FairseqMinTrustLAMB,
    MinTrustLAMB,
    MinTrustLAMBConfig,
)
from tests.conftest import golden_cases
from tests.optim.helpers import check_limits_train, check_refused, config, impossible

CASES = golden_cases("min_trust_lamb")
LEARNING_RATE = CASES.pop("lr")[""]  # of all cases


def settings(case):
    """The settings of a golden case; those that it does not give have their default."""
    return {
        "lr": float(case.get("setting/lr", LEARNING_RATE)),
        "betas": tuple(case.get("setting/betas", torch.tensor([0.9, 0.999])).double().tolist()),
        "eps": float(case.get("setting/eps", 1e-6)),
        "weight_decay": float(case.get("setting/weight_decay", 0.0)),
        "min_trust": float(case.get("setting/min_trust", 0.0)),
    }


def count(case, prefix):
    return len({key.split("/")[1] for key in case if key.startswith(prefix)})


@pytest.mark.parametrize("name", CASES)
def test_equals_published_code(name):
    case = CASES[name]
    params = [torch.nn.Parameter(case[f"start/{i}"].clone()) for i in range(count(case, "start/"))]
    optimizer = MinTrustLAMB(params, **settings(case))
    for step in range(count(case, "grad/")):
        for i, param in enumerate(params):
            param.grad = case[f"grad/{step}/{i}"].clone()
        optimizer.step()
        for i, param in enumerate(params):
            expected = case[f"after/{step}/{i}"]
            torch.testing.assert_close(param.detach(), expected, atol=1e-6, rtol=1e-5)


def random_params(dtype=torch.double):
    shapes = [(7, 5), (11,), (3, 4, 2), (6,), ()]
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype) * 10**i) for i, s in enumerate(shapes)]
    with torch.no_grad():
        params[3].zero_()  # no norm to trust
    return params


def refuse_fused_kernel(monkeypatch):
    module = sys.modules[MinTrustLAMB.__module__]
    monkeypatch.setattr(module, "suits_fused_kernel", lambda p: False)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("min_trust", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_its_definition(monkeypatch, min_trust, weight_decay, at_once):
    """One tensor at a time, as on CPU, and all at once, as on a GPU."""
    if at_once:
        refuse_fused_kernel(monkeypatch)
    params = random_params()
    options = dict(eps=1e-6, weight_decay=weight_decay, min_trust=min_trust)
    optimizer = MinTrustLAMB(params, lr=0.1, betas=(0.8, 0.95), **options)
    expected = [(p.detach().clone(), *2 * [torch.zeros_like(p)]) for p in params]
    for step in range(4):
        ratios = []
        for i, param in enumerate(params):
            # A gradient of zero leaves an update of zero, whose norm cannot be divided by.
            param.grad = torch.randn_like(param) * (step > 0 or i != 1)
            *expected[i], ratio = min_trust_lamb_reference(
                expected[i][0],
                param.grad,
                *expected[i][1:],
                lr=0.1,
                beta1=0.8,
                beta2=0.95,
                **options,
            )
            ratios.append(ratio)
        if at_once:
            with torch.no_grad():
                found_ratios = optimizer._step(params, optimizer.param_groups[0])
        else:
            optimizer.step()
            found_ratios = optimizer.trust_ratios
        for param, (w, _, _) in zip(params, expected):
            torch.testing.assert_close(param.detach(), w)
        torch.testing.assert_close(found_ratios, torch.stack(ratios).double())


def test_weight_norm_is_bounded_and_the_ratio_is_not():
    param = torch.nn.Parameter(torch.full((100,), 100.0))
    optimizer = MinTrustLAMB([param], lr=0.0, betas=(0.0, 0.0), eps=99.0)
    param.grad = torch.zeros(100)
    param.grad[0] = 1.0  # with this epsilon an update of norm 1 / 100
    optimizer.step()
    assert optimizer.trust_ratios.tolist() == pytest.approx([10.0 / 0.01])


def test_state_survives_saving():
    def train(optimizer, params, steps):
        for seed in steps:
            generator = torch.Generator().manual_seed(seed)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            optimizer.step()

    whole = random_params()
    optimizer = MinTrustLAMB(whole, min_trust=0.25)
    start = [p.detach().clone() for p in whole]
    train(optimizer, whole, range(6))

    halves = [torch.nn.Parameter(p.clone()) for p in start]
    first = MinTrustLAMB(halves, min_trust=0.25)
    train(first, halves, range(3))
    second = MinTrustLAMB(halves, min_trust=0.25)
    second.load_state_dict(first.state_dict())
    train(second, halves, range(3, 6))
    for a, b in zip(whole, halves):
        assert torch.equal(a, b)


def test_fp16_with_flat_parameters_is_refused(monkeypatch):
    """fairseq must not train with one trust ratio for all parameters."""
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    # Building the flat copy itself needs a GPU.
    flat = torch.nn.Parameter(torch.ones(4))
    monkeypatch.setattr(FP16Optimizer, "build_fp32_params", lambda *_, **__: flat)
    cfg = OmegaConf.create({"optimizer": config(MinTrustLAMBConfig), "common": {"fp16": True}})
    cfg.optimizer._name = "min_trust_lamb"
    with pytest.raises(RuntimeError, match="--fp16-no-flatten-grads"):
        FP16Optimizer.build_optimizer(cfg, [flat])


@pytest.mark.parametrize(
    "name, value", impossible(["lamb_eps"], ["weight_decay", "min_trust"], ["lamb_betas"])
)
def test_impossible_settings_are_refused(name, value):
    check_refused(FairseqMinTrustLAMB, MinTrustLAMBConfig, name, value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(lamb_eps=1e-30),
        dict(lamb_betas=[0.0, 0.0]),
        dict(weight_decay=1e6),
        dict(lr=[0.0], min_trust=0.25),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_settings_at_the_limits_train(monkeypatch, fields, fused):
    if not fused:
        refuse_fused_kernel(monkeypatch)
    check_limits_train(FairseqMinTrustLAMB, MinTrustLAMBConfig, **fields)


def test_resumed_run_takes_settings_from_its_config():
    params = random_params()
    cfg = config(MinTrustLAMBConfig, min_trust=0.5, weight_decay=0.1)
    saved = FairseqMinTrustLAMB(cfg, params).state_dict()
    resumed = FairseqMinTrustLAMB(config(MinTrustLAMBConfig, min_trust=0.25), params)
    resumed.load_state_dict(saved)
    (group,) = resumed.param_groups
    assert group["min_trust"] == 0.25 and group["weight_decay"] == 0


def test_gradient_of_another_layout_is_paired_by_place_not_by_memory():
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    params[1].data.copy_(params[0].data)
    gradient = torch.randn(4, 6).t()
    params[0].grad, params[1].grad = gradient, gradient.contiguous()
    for param in params:
        MinTrustLAMB([param], lr=0.1).step()
    torch.testing.assert_close(*params)
