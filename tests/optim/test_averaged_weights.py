"""Averages of weights against torch's ASGD and plain means, alone and in training."""

import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.amp_optimizer import AMPOptimizer

from fairseq_sha.data.codecs import WordCodec
from fairseq_sha.optim.averaged_weights import AveragedWeights, non_monotone, stalled
from fairseq_sha.tasks.segment_language_modeling import (
    SegmentLanguageModelingConfig,
    SegmentLanguageModelingTask,
)
from tests.commands import command, logged_losses
from tests.conftest import dictionary_of
from tests.options import SHA_RNN
from tests.test_workers import NO_DROPOUT, same_weights, train_with_workers
from tests.tiny_corpus import write_folder


def non_monotone_by_hand(costs, patience):
    """The published loop of AWD-LSTM: from its check in each epoch to the list it appends to."""
    before, starts = [], False
    for cost in costs:
        starts = len(before) > patience and cost > min(before[:-patience])
        before.append(cost)
    return starts


def stalled_by_hand(costs, patience, latest):
    """The published loop of lamb: the turn of the best cost, counted on."""
    best, best_turn, starts = float("inf"), 0, False
    for turn, cost in enumerate(costs, 1):
        if cost < best:
            best, best_turn = cost, turn
        starts = turn - best_turn >= patience or (latest > 0 and turn >= latest)
    return starts


def test_triggers_equal_the_published_loops():
    seen = set()
    for _ in range(400):
        length, patience = int(torch.randint(1, 12, ())), int(torch.randint(1, 6, ()))
        latest = int(torch.randint(0, 12, ()))
        costs = torch.randint(20, (length,)).tolist()
        starts = non_monotone(costs, patience)
        assert starts == non_monotone_by_hand(costs, patience)
        late = stalled(costs, patience, latest)
        assert late == stalled_by_hand(costs, patience, latest)
        seen |= {("non_monotone", starts), ("stalled", late)}
    assert len(seen) == 4


def make(skipped=0):
    weights = {"a": torch.nn.Parameter(torch.randn(3)), "b": torch.nn.Parameter(torch.randn(2, 2))}
    return AveragedWeights(weights, lambda costs: len(costs) == 2, skipped)


def update(averaged):
    with torch.no_grad():
        for weight in averaged.parameters.values():
            weight.add_(torch.randn_like(weight))
    averaged.after_update()


@pytest.mark.parametrize("updates", [1, 2, 3, 9])
def test_nt_asgd_averages_as_torch_s_asgd(updates):
    averaged = make(skipped=1)
    assert not averaged.after_validation(1.0)
    assert averaged.after_validation(2.0) and averaged.updates == 0
    theirs = [deepcopy(weight) for weight in averaged.parameters.values()]
    asgd = torch.optim.ASGD(theirs, lr=0.3, t0=0, lambd=0.0, weight_decay=0.1)
    sgd = torch.optim.SGD(averaged.parameters.values(), lr=0.3, weight_decay=0.1)
    for _ in range(updates):
        for weight, other in zip(averaged.parameters.values(), theirs):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        sgd.step()
        asgd.step()
        averaged.after_update()
    averaged.use_average()
    for weight, other in zip(averaged.parameters.values(), theirs):
        torch.testing.assert_close(weight.detach(), asgd.state[other]["ax"])


def test_model_holds_the_average_or_the_trained_weights():
    averaged = make()
    update(averaged)
    averaged.use_average()  # there is none
    averaged.use_trained()
    for cost in (1.0, 2.0):
        averaged.after_validation(cost)
    seen = []
    for _ in range(4):
        update(averaged)
        seen.append([weight.detach().clone() for weight in averaged.parameters.values()])
        averaged.use_average()
        averaged.use_average()
        for i, weight in enumerate(averaged.parameters.values()):
            expected = torch.stack([weights[i] for weights in seen]).mean(0)
            torch.testing.assert_close(weight.detach(), expected)
        averaged.use_trained()
        averaged.use_trained()
        assert all(map(torch.equal, averaged.parameters.values(), seen[-1]))


@pytest.mark.parametrize("updates", [0, 3])
def test_goes_on_where_a_checkpoint_was_written(updates):
    averaged = make()
    for cost in (1.0, 2.0):
        averaged.after_validation(cost)
    for _ in range(updates):
        update(averaged)
    averaged.use_average()
    resumed = AveragedWeights(deepcopy(averaged.parameters), averaged.starts)
    resumed.load_state_dict(averaged.state_dict())
    averaged.use_trained()
    assert all(map(torch.equal, averaged.parameters.values(), resumed.parameters.values()))
    for one in (averaged, resumed):
        torch.manual_seed(5)
        update(one)
        one.use_average()
    assert all(map(torch.equal, averaged.parameters.values(), resumed.parameters.values()))
    assert averaged.costs == resumed.costs and averaged.updates == resumed.updates == updates + 1


# In training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=9000)


def model_of(path):
    return torch.load(path, weights_only=True)["model"]


def validations(output):
    found = re.findall(r"valid on 'valid' subset \| (loss \S+).*?num_updates (\d+)", output)
    return {updates: loss for loss, updates in found}


def test_checkpoints_hold_the_mean_of_the_weights_and_resume(data, tmp_path):
    """Averaging changes no update. The run resumed from a checkpoint repeats the whole one."""
    options = f"{SHA_RNN} --max-update 18 --no-epoch-checkpoints --save-dir"
    average = "--average-weights stalled --average-patience 99 --average-latest 2"
    average = f"{options} {tmp_path}/whole {average} --save-interval-updates 6"
    whole = command("fairseq-train", data, average)
    assert whole.returncode == 0, whole.stdout
    assert whole.stdout.count("averaging the weights of all updates from here on") == 1
    plain = command("fairseq-train", data, f"{options} {tmp_path}/plain --save-interval-updates 1")
    assert plain.returncode == 0, plain.stdout
    losses = logged_losses(whole.stdout)
    assert len(losses) == 18 and losses == logged_losses(plain.stdout)

    def each(updates):
        paths = [next((tmp_path / "plain").glob(f"checkpoint_*_{n}.pt")) for n in updates]
        return [model_of(path) for path in paths]

    (trained,) = each([12])  # averaging starts after the second validation
    saved = model_of(next((tmp_path / "whole").glob("checkpoint_*_12.pt")))
    assert all(torch.equal(saved[name], trained[name]) for name in trained)
    trained = each(range(13, 19))
    saved = model_of(tmp_path / "whole" / "checkpoint_last.pt")
    assert len(saved) > 5
    for name, weight in saved.items():
        expected = torch.stack([weights[name] for weights in trained]).mean(0)
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
    assert validations(whole.stdout)["12"] == validations(plain.stdout)["12"]
    assert validations(whole.stdout)["18"] != validations(plain.stdout)["18"]

    for updates, left in ((6, 12), (12, 6), (18, 3)):
        (path,) = (tmp_path / "whole").glob(f"checkpoint_*_{updates}.pt")
        save = tmp_path / f"resumed{updates}"
        resumed_options = average.replace(f"{tmp_path}/whole", str(save))
        if updates == 18:  # from the average back to the trained weights
            resumed_options = resumed_options.replace("--max-update 18", "--max-update 21")
            longer = average.replace(f"{tmp_path}/whole", f"{tmp_path}/longer")
            longer = longer.replace("--max-update 18", "--max-update 21")
            done = command("fairseq-train", data, longer)
            losses, last = logged_losses(done.stdout), tmp_path / "longer" / "checkpoint_last.pt"
        else:
            last = tmp_path / "whole" / "checkpoint_last.pt"
        resumed = command("fairseq-train", data, f"{resumed_options} --restore-file {path}")
        again = logged_losses(resumed.stdout)
        assert len(again) == left, resumed.stdout
        assert again == {update: losses[update] for update in again}
        ours, expected = model_of(save / "checkpoint_last.pt"), model_of(last)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    anew = average.replace(f"{tmp_path}/whole", f"{tmp_path}/anew --max-update 19")
    anew = command("fairseq-train", data, f"{anew} --restore-file {path} --reset-dataloader")
    assert "are averages; training starts from them, and averaging anew" in anew.stdout


@pytest.mark.parametrize(
    "kind, costs, starts, skipped",
    [("non_monotone", [3.0, 2.0, 1.0, 2.5], 4, 1), ("stalled", [3.0, 2.0, 2.5, 2.6], 3, 0)],
)
def test_cost_of_the_first_split_starts_the_averaging_of_its_kind(kind, costs, starts, skipped):
    cfg = SegmentLanguageModelingConfig(
        average_weights=kind, average_patience=1, fp16=False, bf16=False, disable_validation=False
    )
    task = SegmentLanguageModelingTask(cfg, WordCodec(dictionary_of(29)))
    task.model = torch.nn.Linear(2, 2)
    task.averaged = task._averaged_weights()
    assert task.averaged.skipped == skipped
    for number, cost in enumerate(costs, 1):
        task.begin_valid_epoch(1, task.model)
        for of_split in (cost, 9.0):
            task.post_validate(task.model, {}, {"nats": SimpleNamespace(avg=of_split)})
        assert (task.averaged.updates is not None) == (number >= starts)
    assert task.averaged.costs == costs


class Scaler:
    """Stands for torch's GradScaler: its scale before the update and after it."""

    def __init__(self, before, after):
        self.scale, self.after = before, after

    def get_scale(self):
        return self.scale

    def step(self, optimizer):
        pass

    def update(self):
        self.scale = self.after


def test_update_whose_gradients_overflow_is_not_averaged():
    averaged = make()
    for cost in (1.0, 2.0):
        averaged.after_validation(cost)
    task = SimpleNamespace(
        cfg=SimpleNamespace(
            scale_lr_by_length=False,
            disable_validation=True,
            save_interval_updates=0,
            validate_after_updates=0,
        ),
        averaged=averaged,
        train_iterator=None,
        _segment_lengths=[],
    )
    counts = []
    for before, after in ((8, 4), (4, 4), (4, 2), (2, 4)):
        optimizer = object.__new__(AMPOptimizer)
        optimizer._grad_scaler = Scaler(before, after)
        optimizer.fp32_optimizer = SimpleNamespace(optimizer=None)
        model = SimpleNamespace(decoder=None)
        SegmentLanguageModelingTask.optimizer_step(task, optimizer, model, 0)
        counts.append(averaged.updates)
    assert counts == [0, 1, 1, 2]


@pytest.mark.long
def test_two_workers_average_as_one_does(data, tmp_path):
    """And go on from their checkpoint with the weights that are trained."""
    average = "--average-weights stalled --average-patience 99 --average-latest 2"
    options = f"{NO_DROPOUT['SHARNN']} {average} --max-update 12 --save-interval-updates 4"
    one = command("fairseq-train", data, f"{options} --save-dir {tmp_path / 'one'}")
    assert one.returncode == 0, one.stdout
    half = options.replace("--batch-size 4", "--batch-size 2")
    two = train_with_workers(data, f"{half} --save-dir {tmp_path / 'two'}")
    for output in (one.stdout, two):
        assert output.count("averaging the weights of all updates from here on") == 1
    same_weights(tmp_path / "one", tmp_path / "two")
    folder = tmp_path / "again"
    restore = f"--restore-file {tmp_path}/two/checkpoint_1_8.pt --save-dir {folder}"
    again = train_with_workers(data, f"{half} {restore}")
    expected, losses = logged_losses(two), logged_losses(again)
    assert len(losses) == 4 and losses == {update: expected[update] for update in losses}
    same_weights(tmp_path / "two", folder)


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--disable-validation", "--average-weights non_monotone: starts after a validation"),
        ("--average-patience 0", "--average-patience 0: must be at least 1"),
        ("--average-latest 1", "--average-latest 1: is for --average-weights stalled"),
    ],
)
def test_runs_that_could_not_average_are_refused(data, tmp_path, extra, message):
    options = f"{SHA_RNN} --average-weights non_monotone {extra} --save-dir {tmp_path}"
    done = command("fairseq-train", data, options)
    assert done.returncode == 1 and message in done.stdout.strip().splitlines()[-1]
