import math
import re

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_sha.errors import UserError
from fairseq_sha.optim.cosine_annealing import CosineAnnealing, CosineAnnealingConfig
from fairseq_sha.optim.radam import FairseqRAdam, RAdamConfig
from tests.commands import command
from tests.optim.helpers import NEGATIVE
from tests.optim.helpers import config as optimizer_config
from tests.options import SHA_RNN
from tests.tiny_corpus import write_folder


def schedule(lr=(3e-4,), max_update=100, **fields):
    """The rates that a run sets: a function of the number of updates made."""
    cfg = OmegaConf.structured(CosineAnnealingConfig(**fields))
    cfg.lr, cfg.max_update = list(lr), max_update
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = FairseqRAdam(optimizer_config(RAdamConfig, lr=[1.0]), params)
    scheduler = CosineAnnealing(cfg, optimizer)

    def rate(updates):
        returned = scheduler.step_update(updates)
        (group,) = optimizer.param_groups
        assert returned == group["lr"]
        return returned

    return rate


def rates_of_published_loop(lr, updates, warmup, first):
    """The rate of each update where warm-up overwrites what torch's scheduler set, and the
    scheduler goes on from there."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    rates = []
    for n in range(updates):
        if n < warmup:
            optimizer.param_groups[0]["lr"] = lr * (n + first) / warmup
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("skips_zero", [False, True])
@pytest.mark.parametrize("updates, warmup", [(100, 40), (1000, 13), (50, 2), (60, 0)])
def test_rates_are_those_of_torch_under_warmup(updates, warmup, skips_zero):
    rate = schedule(max_update=updates, warmup_updates=warmup, warmup_skips_zero=skips_zero)
    expected = rates_of_published_loop(3e-4, updates, warmup, int(skips_zero))
    assert [rate(n) for n in range(updates)] == pytest.approx(expected, rel=1e-9, abs=0)
    assert rate(updates) == 0


def test_warmup_of_one_update_that_starts_at_zero_is_refused():
    """torch's scheduler multiplies the rate of 0 ever after."""
    assert rates_of_published_loop(3e-4, 9, 1, first=0) == [0] * 9
    with pytest.raises(UserError, match="--warmup-updates 1: all learning rates would be 0"):
        schedule(max_update=9, warmup_updates=1)


@pytest.mark.parametrize("skips_zero", [False, True])
def test_rates_of_the_wikitext_103_run_of_srupp(skips_zero):
    """Computed with torch's scheduler under the loop of the published script."""
    rate = schedule(max_update=400_000, warmup_updates=16_000, warmup_skips_zero=skips_zero)
    assert rate(8_000) == pytest.approx(1.5e-4, rel=2e-4)
    assert f"{rate(100_000):.4g} {rate(200_000):.4g}" == "0.0002571 0.0001506"


def test_rates_of_transformer_xl_large():
    """Its published code sets the cosine itself after warm-up, and the full rate for the first
    update."""
    updates, warmup = 4_000_000, 16_000
    rate = schedule([2.5e-4], updates, warmup_updates=warmup)
    for n in (1, 2000, warmup - 1):
        assert rate(n) == pytest.approx(2.5e-4 * n / warmup, rel=1e-9)
    for n in (warmup, 100_000, 2_000_000, 3_900_000):
        published = 2.5e-4 * 0.5 * (1 + math.cos(math.pi * n / updates))
        assert rate(n) == pytest.approx(published, rel=1e-4)


def test_run_that_ends_in_warmup():
    rate = schedule(max_update=10, warmup_updates=40)
    assert [rate(n) for n in (0, 9, 10)] == pytest.approx([0, 3e-4 * 9 / 40, 3e-4 * 10 / 40])
    rate = schedule(max_update=10, warmup_updates=11)
    assert rate(11) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_update": 0}, "--max-update 0: .* needs the number of updates; give it"),
        ({"lr": [0.1, 0.2]}, r"--lr \[0.1, 0.2\]: .* takes one; .* --lr-scheduler fixed"),
        ({"warmup_updates": -1}, "--warmup-updates -1: must be at least 0"),
        *(({"lr": [value]}, "--lr .*: must be 0, or positive and finite") for value in NEGATIVE),
    ],
)
def test_settings_without_a_schedule_are_refused(settings, message):
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        schedule(**settings)


def test_training_logs_the_rate_of_the_next_update(tmp_path):
    options = re.sub(r"--(lr-scheduler|lr|warmup-updates) \S+", "", SHA_RNN)
    options += f" --lr-scheduler cosine_annealing --lr 0.01 --save-dir {tmp_path}/run"
    options += " --warmup-updates 4 --warmup-skips-zero --max-update 9"
    done = command("fairseq-train", write_folder(tmp_path / "data"), options)
    assert done.returncode == 0, done.stdout
    logged = re.findall(r"train_inner.*?num_updates=(\d+).*?lr=([^,\s]+)", done.stdout)
    expected = [*rates_of_published_loop(0.01, 9, 4, first=1)[1:], 0]
    assert [int(updates) for updates, _ in logged] == list(range(1, 10))
    assert [float(rate) for _, rate in logged] == pytest.approx(expected, rel=1e-3)
