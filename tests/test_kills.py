"""Runs that are killed, at random moments and while they write checkpoints, go on as if nothing had
happened."""

import random
import re

import pytest
import torch

from tests.commands import command, logged_losses, start
from tests.options import FAMILIES, SHA_RNN
from tests.tiny_corpus import write_folder

# Three files are written every three updates: the run spends much of its time there.
FREQUENT = "--save-interval-updates 3 --keep-interval-updates 2 --max-update 60"
#: with updates of two segments
ACCUMULATION = "--update-freq 2"
KILLS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=9000)


def validations(output):
    lines = re.findall(r"valid on 'valid' subset \| (loss \S+).*?num_updates (\d+)", output)
    return {updates: loss for loss, updates in lines}


def being_written(folder):
    return any(folder.glob("*.tmp")) or any(folder.glob("*.unfinished"))


@pytest.mark.parametrize(
    "name, extra",
    [
        ("SHARNN", ""),
        *[pytest.param(name, "", marks=pytest.mark.long) for name in FAMILIES if name != "SHARNN"],
        pytest.param("SHARNN", ACCUMULATION, marks=pytest.mark.long),
    ],
)
def test_killed_run_repeats_the_uninterrupted_one(data, tmp_path, name, extra):
    options = f"{FAMILIES[name]} {extra} {FREQUENT} --save-dir"
    whole = command("fairseq-train", data, f"{options} {tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stdout
    losses, valid = logged_losses(whole.stdout), validations(whole.stdout)
    assert len(losses) == 60 and len(valid) >= 20

    folder = tmp_path / "killed"
    choose = random.Random(1)
    outputs = []
    for kill in range(KILLS):
        running = start("fairseq-train", data, f"{options} {folder}")
        # Each lives long enough for some progress.
        goal = choose.randint(4, 8)
        running.wait_for(lambda: len(logged_losses(running.output())) >= goal)  # noqa: B023
        if kill % 2 == 0:
            running.wait_for(lambda: being_written(folder))
        running.kill()
        done = running.wait()
        outputs.append(done.stdout)
        assert done.returncode == -9, done.stdout
    last = command("fairseq-train", data, f"{options} {folder}")
    assert last.returncode == 0, last.stdout
    outputs.append(last.stdout)

    for output in outputs[1:]:
        assert "going on from nothing" not in output and "Loaded checkpoint" in output
    for output in outputs:
        for update, logged in logged_losses(output).items():
            assert logged == losses[update], update
        for update, logged in validations(output).items():
            assert logged == valid[update], update
    assert set().union(*map(logged_losses, outputs)) == set(losses)
    assert not list(folder.glob("*.unfinished"))
    ours, theirs = (
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)["model"]
        for run in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_run_that_is_done_stays_as_it_is(data, tmp_path):
    options = f"{SHA_RNN} --max-update 6 --save-dir {tmp_path}"
    first = command("fairseq-train", data, options)
    assert first.returncode == 0, first.stdout
    last = (tmp_path / "checkpoint_last.pt").read_bytes()
    again = command("fairseq-train", data, options)
    assert again.returncode == 0, again.stdout
    assert "nothing left to train: there have been 6 updates" in again.stdout
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == last


def test_run_that_has_used_its_time_stays_as_it_is(data, tmp_path):
    options = f"{SHA_RNN} --stop-time-hours 1e-9 --save-dir {tmp_path}"
    first = command("fairseq-train", data, options)
    assert first.returncode == 0, first.stdout
    last = (tmp_path / "checkpoint_last.pt").read_bytes()
    again = command("fairseq-train", data, options)
    assert again.returncode == 0, again.stdout
    assert "nothing left to train: there have been 1 updates (--stop-time-hours" in again.stdout
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == last


def test_patience_goes_on_counting(data, tmp_path):
    """Without a learning rate nothing improves: the first validation is followed by three more."""
    options = f"{SHA_RNN} --lr 0 --validate-interval-updates 2 --save-interval-updates 2"
    options += f" --patience 3 --save-dir {tmp_path} --max-update"
    first = command("fairseq-train", data, f"{options} 4")
    assert first.returncode == 0 and "early stop" not in first.stdout, first.stdout
    second = command("fairseq-train", data, f"{options} 30")
    assert second.returncode == 0, second.stdout
    assert "early stop since valid performance" in second.stdout
    assert set(logged_losses(second.stdout)) == {f"num_updates={i}" for i in (5, 6, 7, 8)}
    third = command("fairseq-train", data, f"{options} 30")
    assert "nothing left to train: there have been 8 updates (--patience 3)" in third.stdout
    assert third.returncode == 0 and not logged_losses(third.stdout)


def test_count_that_checkpoints_do_not_hold_is_named(data, tmp_path):
    options = f"{SHA_RNN} --save-dir {tmp_path} --lr-scheduler reduce_lr_on_plateau --lr-patience 2"
    first = command("fairseq-train", data, f"{options} --max-update 2")
    assert first.returncode == 0 and "starts anew" not in first.stdout, first.stdout
    second = command("fairseq-train", data, f"{options} --max-update 4")
    assert "the count of --lr-patience starts anew" in second.stdout, second.stdout


def test_checkpoint_without_optimizer_is_not_trained_anew_in_silence(data, tmp_path):
    options = f"{SHA_RNN} --max-update 4 --save-dir {tmp_path} --no-save-optimizer-state"
    first = command("fairseq-train", data, options)
    assert first.returncode == 0, first.stdout
    for more in ("", "--reset-dataloader"):
        again = command("fairseq-train", data, f"{options} {more}")
        assert again.returncode == 1 and not logged_losses(again.stdout)
        last_line = again.stdout.strip().splitlines()[-1]
        assert "written after 4 updates with --no-save-optimizer-state" in last_line
    reset = command("fairseq-train", data, f"{options} --reset-optimizer")
    assert reset.returncode == 0 and len(logged_losses(reset.stdout)) == 4, reset.stdout


@pytest.mark.parametrize(
    "extra, checkpoints",
    [
        # Lines of several updates, across the border of epochs.
        ("--log-interval 4", ("checkpoint1.pt", "checkpoint_2_70.pt")),
        # (fairseq saves the end of an epoch before this scheduler has looked at it.)
        (
            "--lr-scheduler reduce_lr_on_plateau --lr-shrink 0.5 --lr-threshold 100",
            ("checkpoint_2_70.pt",),
        ),
    ],
)
def test_resumed_run_logs_the_same(data, tmp_path, extra, checkpoints):
    options = f"{SHA_RNN} --max-update 150 --save-interval-updates 70 {extra} --save-dir"
    whole = command("fairseq-train", data, f"{options} {tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stdout
    losses = logged_losses(whole.stdout)
    for name in checkpoints:
        start = tmp_path / "whole" / name
        resumed = command(
            "fairseq-train", data, f"{options} {tmp_path / name} --restore-file {start}"
        )
        assert resumed.returncode == 0, resumed.stdout
        again = logged_losses(resumed.stdout)
        assert len(again) >= 10 and again == {update: losses[update] for update in again}


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_optimisers_of_fairseqs_older_kind_go_on(data, tmp_path, optimizer):
    """Their settings are an object, which torch would refuse to load."""
    options = f"{SHA_RNN} --save-dir {tmp_path} --max-update"
    options = options.replace("min_trust_lamb --min-trust 0.25", optimizer)
    options = options.replace("--warmup-updates 5", "")
    for updates in (4, 7):
        done = command("fairseq-train", data, f"{options} {updates}")
        assert done.returncode == 0, done.stdout
    assert set(logged_losses(done.stdout)) == {f"num_updates={i}" for i in (5, 6, 7)}
    scored = command("fairseq-eval-lm", data, f"--path {tmp_path}/checkpoint_last.pt --cpu")
    assert scored.returncode == 0, scored.stdout


def test_run_without_carried_state_says_so(data, tmp_path):
    options = f"{SHA_RNN} --save-interval-updates 5 --save-dir {tmp_path} --max-update"
    never = f"{options} 12 --save-carried-state never"
    first = command("fairseq-train", data, never)
    assert "leaves out the carried state" in first.stdout, first.stdout
    second = command("fairseq-train", data, f"{options} 15 --save-carried-state never")
    assert "holds no carried state; going on from nothing" in second.stdout
    assert len(logged_losses(second.stdout)) == 3


def test_finetuning_starts_from_the_weights_alone(data, tmp_path):
    options = f"{SHA_RNN} --max-update 5 --save-dir"
    first = command("fairseq-train", data, f"{options} {tmp_path / 'first'}")
    weights = tmp_path / "first" / "checkpoint_last.pt"
    second = command(
        "fairseq-train", data, f"{options} {tmp_path / 'second'} --finetune-from-model {weights}"
    )
    assert second.returncode == 0, second.stdout
    ours, before = (
        [float(loss) for loss in re.findall(r"train_inner.*?loss=([0-9.]+)", run.stdout)]
        for run in (second, first)
    )
    assert len(ours) == 5 and ours[0] < before[0] - 0.3
