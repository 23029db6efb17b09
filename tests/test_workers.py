"""Several workers give what one gives; here over gloo, on the CPU."""

import re
import socket

import pytest
import torch

from tests.commands import command, logged_losses, start
from tests.options import FAMILIES, SHA_RNN
from tests.tiny_corpus import write_folder

OPTIONS = "--tokens-per-sample 40 --save-interval-updates 4 --max-update 10"
# Steps in proportion to gradients: what others make of all but vanishing ones is down to rounding.
SGD = "--optimizer sgd --lr 0.1 --lr-scheduler fixed"
NO_DROPOUT = {
    **{name: f"{text} --dropout 0" for name, text in FAMILIES.items()},
    "SHARNN": f"{SHA_RNN} --dropout-input 0 --dropout-hidden 0 --dropout-output 0",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def start_workers(data, options, number=2, **kwargs):
    """One process each, as without a GPU; see the README."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    shared = f"""{options} --distributed-world-size {number} --distributed-init-method {address}
        --distributed-backend gloo --distributed-no-spawn --ddp-backend legacy_ddp
        --load-checkpoint-on-all-dp-ranks"""
    return [
        start("fairseq-train", data, f"{shared} --distributed-rank {rank}", **kwargs)
        for rank in range(number)
    ]


def train_with_workers(data, options, number=2, **kwargs):
    """What the first of the workers printed."""
    done = [worker.wait(120) for worker in start_workers(data, options, number, **kwargs)]
    for worker in done:
        assert worker.returncode == 0, worker.stdout
    return done[0].stdout


def bits(output):
    """Bits per byte of each update and each validation, to four decimals."""
    values = re.findall(r"(?:train_inner.*?bpc=|valid on 'valid' subset.*? bpc )([0-9.]+)", output)
    return torch.tensor([float(value) for value in values])


def same_weights(one, other):
    """The weights of the last checkpoints in two folders, to 1e-4."""
    one, other = (
        torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
        for folder in (one, other)
    )
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, extra",
    [
        ("SHARNN", ""),
        *[pytest.param(name, SGD, marks=pytest.mark.long) for name in FAMILIES if name != "SHARNN"],
        pytest.param("SHARNN", "--update-freq 2", marks=pytest.mark.long),
        pytest.param("SHARNN", "--disable-validation", marks=pytest.mark.long),
        pytest.param("SHARNN", "--valid-subset valid,train", marks=pytest.mark.long),
    ],
)
def test_two_workers_with_half_the_streams_give_what_one_gives(data, tmp_path, name, extra):
    """In training and in the validation inside it; and each resumes what the other began."""
    options = f"{NO_DROPOUT[name]} {OPTIONS} {extra}"
    one = command("fairseq-train", data, f"{options} --save-dir {tmp_path / 'one'}")
    assert one.returncode == 0, one.stdout
    half = options.replace("--batch-size 4", "--batch-size 2")
    two = train_with_workers(data, f"{half} --save-dir {tmp_path / 'two'}")
    assert len(bits(two)) >= 10
    torch.testing.assert_close(bits(two), bits(one.stdout), atol=1.1e-4, rtol=0)
    same_weights(tmp_path / "one", tmp_path / "two")

    restore = f"--restore-file {tmp_path}/two/checkpoint_1_4.pt --save-dir {tmp_path}"
    two_again = train_with_workers(data, f"{half} {restore}/again")
    expected = logged_losses(two)
    resumed = logged_losses(two_again)
    assert len(resumed) == 6
    assert resumed == {update: expected[update] for update in resumed}
    one_again = command("fairseq-train", data, f"{options} {restore}/alone")
    for output in (two_again, one_again.stdout):
        assert "from nothing" not in output
    same_weights(tmp_path / "one", tmp_path / "alone")


def test_other_number_of_streams_begins_the_epoch_again(data, tmp_path):
    options = f"{NO_DROPOUT['SHARNN']} {OPTIONS} --save-dir {tmp_path}"
    train_with_workers(data, options.replace("--batch-size 4", "--batch-size 2"))
    more = command("fairseq-train", data, f"{options} --batch-size 2 --max-update 12")
    assert more.returncode == 0, more.stdout
    assert "another number of streams; beginning epoch 1 again" in more.stdout


def test_state_that_a_stop_by_time_loses_is_named(data, tmp_path):
    """Nothing tells the workers in time that this checkpoint will be written."""
    options = f"{NO_DROPOUT['SHARNN']} --batch-size 2 --disable-validation --save-dir {tmp_path}"
    first = train_with_workers(data, f"{options} --stop-time-hours 1e-9")
    assert "leaves out the carried state, since this worker has only its own part" in first
    second = train_with_workers(data, f"{options} --max-update 3")
    assert "holds no carried state; going on from nothing" in second


def test_worker_that_dies_stops_the_others(data, tmp_path):
    options = f"{NO_DROPOUT['SHARNN']} --max-update 3000 --save-dir {tmp_path}"
    first, second = start_workers(data, options)
    second.wait_for(lambda: "begin training epoch" in first.output())
    second.kill()
    assert second.wait(10).returncode == -9
    done = first.wait(60)
    assert done.returncode not in (0, -9)
    assert re.search(r"Error|error", done.stdout)


@pytest.mark.parametrize("name", ["fairseq-eval-lm", "fairseq-validate"])
def test_evaluation_with_several_workers_is_refused(data, tmp_path, name):
    trained = command("fairseq-train", data, f"{SHA_RNN} --max-update 1 --save-dir {tmp_path}")
    assert trained.returncode == 0, trained.stdout
    options = f"--path {tmp_path}/checkpoint_last.pt --batch-size 2 --cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    options += f""" --distributed-world-size 2 --distributed-init-method {address}
        --distributed-backend gloo --distributed-no-spawn"""
    workers = [start(name, data, f"{options} --distributed-rank {rank}") for rank in (0, 1)]
    for worker in workers:
        done = worker.wait(60)
        assert done.returncode != 0 and "Traceback" not in done.stdout, done.stdout
        assert "error: 2 workers: fairseq would report" in done.stdout
