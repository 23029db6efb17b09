"""What a user can get wrong: one line that names the problem and the remedy, and nothing is left
half-written."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_sha import UserError, errors
from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.models.sha_rnn import SHARNN
from fairseq_sha.weights_import import read_symbols, read_weights
from tests.commands import REPOSITORY, command
from tests.options import FAMILIES, SHA_RNN
from tests.test_commands import RunsCode
from tests.tiny_corpus import text, write_folder, write_split

TRAIN = f"{SHA_RNN} --max-update 3"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Path(write_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def checkpoints(good, tmp_path_factory):
    """A checkpoint of SHA-RNN, one of Transformer-XL, and files that are none."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("SHARNN", "TransformerXL"):
        options = f"{FAMILIES[name]} --max-update 2 --save-dir {folder / name}"
        done = command("fairseq-train", good, options)
        assert done.returncode == 0, done.stdout
        shutil.move(folder / name / "checkpoint_last.pt", folder / f"{name}.pt")
        shutil.rmtree(folder / name)
    whole = (folder / "SHARNN.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("no checkpoint at all\n" * 20)
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"some": torch.zeros(3)}, folder / "foreign.pt")
    torch.save({"model": RunsCode(str(folder / "ran"))}, folder / "malicious.pt")
    return folder


# How a data folder can be wrong: each takes a copy of a good one.


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def first_line_of(name):
    return lambda folder: (folder / name).write_text(
        (folder / name).read_text().split()[0] + " 1\n"
    )


def patch(name, offset, content):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[offset : offset + len(content)] = content
        (folder / name).write_bytes(data)

    return change


def write_part(split):
    return lambda folder: write_split(
        text(50), folder, split, ByteDictionary.load(str(folder / "dict.txt"))
    )


def write_tiny_split(size):
    return lambda folder: write_split(
        text(size), folder, "train", ByteDictionary.load(str(folder / "dict.txt"))
    )


DATA = {
    "no folder": (shutil.rmtree, "dict.txt: no such file"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "dict.txt: no such file"),
    "no dictionary": (remove("dict.txt"), "dict.txt: no such file"),
    "empty dictionary": (replace("dict.txt", b""), "holds tokens that .*dict.txt lacks"),
    "short dictionary": (first_line_of("dict.txt"), "holds tokens that .*dict.txt lacks"),
    "truncated dictionary": (cut("dict.txt", 12), "dict.txt: not a dictionary"),
    "binary dictionary": (replace("dict.txt", bytes(range(256))), "dict.txt: not a dictionary"),
    "dictionary of words": (replace("dict.txt", b"the 9\nof 5\n"), "'the' is not a byte value"),
    "dictionary without counts": (replace("dict.txt", b"97\n98\n"), "dict.txt: not a dictionary"),
    "dictionary with repeats": (replace("dict.txt", b"97 1\n97 1\n"), "dict.txt: not a dictionary"),
    "symbol above 255": (replace("dict.txt", b"97 1\n256 1\n"), "'256' is not a byte value"),
    "no index": (remove("train.idx"), "train.idx: no such file"),
    "no data": (remove("train.bin"), "train.bin: no such file"),
    "no valid": (remove("valid.idx"), "valid.idx: no such file"),
    "empty index": (replace("train.idx", b""), "train.idx: not an index"),
    "index of text": (replace("train.idx", b"no index\n" * 99), "train.idx: not an index"),
    "truncated index": (cut("train.idx", 100), "train.idx: not an index"),
    "index of another type": (patch("train.idx", 17, b"\x63"), "train.idx: not an index"),
    "index of too many": (patch("train.idx", 25, b"\x80"), "train.idx: not an index"),
    "empty data": (replace("train.bin", b""), "train.bin: its size differs"),
    "truncated data": (cut("train.bin", 999), "train.bin: its size differs"),
    "foreign data": (
        lambda f: (f / "train.bin").write_bytes(b"\xff" * (f / "train.bin").stat().st_size),
        "train.bin: holds tokens that .*dict.txt lacks",
    ),
    "padding": (patch("train.bin", 800, b"\x01\0"), "holds <pad>, .* no text .*at offset 400"),
    "unknown byte": (patch("train.bin", 900, b"\x03\0"), "holds <unk>, which stands for no text"),
    "one foreign token": (
        patch("train.bin", 1000, b"\xc8\0"),
        "holds tokens that .*dict.txt lacks .token 200 at offset 500",
    ),
    "part of train": (write_part("train1"), "train1.idx: a second part of train, which fairseq"),
    "part of valid": (write_part("valid1"), "valid1.idx: would not be validated on; name it in"),
    "one token": (write_tiny_split(1), "train.bin: fewer than two tokens"),
    "fewer than streams": (write_tiny_split(4), "--batch-size 4: 4 streams .* 3 predictions"),
}

OPTIONS = {
    "no streams": ("--batch-size 0", "--batch-size 0: must be at least 1"),
    "no segment": ("--tokens-per-sample 0", "--tokens-per-sample 0: must be at least 1"),
    "negative segment": ("--tokens-per-sample -5", "--tokens-per-sample -5: must be at least 1"),
    "no layers": ("--num-layers 0 --attention-layers []", "--num-layers 0: must be at least 1"),
    "no width": ("--width 0", "--width 0: must be at least 1"),
    "dead tokens": (
        "--cell sru --dropout-embedding 0.1",
        "--dropout-embedding 0.1: --cell sru begins with infinite gradients; leave it out",
    ),
    "window": ("--window 39", "--window 39: below --tokens-per-sample 40"),
    "no window": ("--window 0", "--window 0: "),
    "no such layer": ("--attention-layers 2", "--attention-layers 2: there are 2 layers"),
    "negative dropout": ("--dropout-hidden -0.1", "--dropout-hidden -0.1: must be at least 0"),
    "all dropped": ("--dropout-output 1", "--dropout-output 1.0: must be at least 0 and below 1"),
    "dropout nan": ("--dropout-input nan", "--dropout-input nan: must be"),
    "trust": ("--min-trust -1", "--min-trust -1"),
    "bf16": ("--bf16", "--bf16 means a TPU"),
    "save-dir": ("--save-dir {checkpoints}/text.pt", "--save-dir .*text.pt: cannot be written to"),
    "remainder": ("--skip-remainder-batch", "--skip-remainder-batch: would leave out"),
    "valid steps": ("--max-valid-steps 3", "--max-valid-steps: would give the score of a part"),
    "max tokens": ("--max-tokens 100", "--max-tokens 100: 4 streams .* of 40 tokens .* are more"),
    "no valid streams": ("--batch-size-valid 0", "--batch-size-valid 0: must be at least 1"),
    "max valid tokens": (
        "--max-tokens-valid 10",
        "--max-tokens-valid 10: 4 streams .--batch-size-valid. with segments",
    ),
    "loss scale": ("--amp --amp-scale-window 500", "--amp-init-scale and --amp-scale-window: "),
    "bos": ("--add-bos-token", "--add-bos-token: not supported"),
    "finetune": ("--finetune-from-model {checkpoints}/none.pt", "none.pt"),
    "finetune text": ("--finetune-from-model {checkpoints}/text.pt", "text.pt: not a checkpoint"),
    "finetune and reset": (
        "--finetune-from-model {checkpoints}/SHARNN.pt --reset-optimizer",
        "--reset-optimizer: cannot be combined with --finetune-from-model",
    ),
    "finetune and restore": (
        "--finetune-from-model {checkpoints}/SHARNN.pt --restore-file {checkpoints}/SHARNN.pt",
        "--restore-file .*: cannot be combined with --finetune-from-model",
    ),
    "restore none": ("--restore-file {checkpoints}/none.pt", "none.pt: no such file"),
    "restore a folder": ("--restore-file {checkpoints}", "checkpoints.*: no such file"),
    "continue once": ("--continue-once {checkpoints}/none.pt", "--continue-once .*none.pt: no su"),
    "restore from save-dir": (
        "--restore-file SHARNN.pt --save-dir {checkpoints}",
        "--restore-file SHARNN.pt: no such file; name .*/SHARNN.pt",
    ),
    "another criterion": (
        "--restore-file {checkpoints}/SHARNN.pt --criterion cross_entropy_with_auxiliary_losses",
        "SHARNN.pt: Criterion does not match; please reset the optimizer",
    ),
    "update-freq": ("--update-freq 0", "--update-freq 0: must be at least 1"),
    "workers": ("--num-workers -1", "--num-workers -1: must be at least 0"),
    "metric": (
        "--best-checkpoint-metric acc",
        "acc: choose one of loss, ppl, nats, bpb, bpc",
    ),
    "no total": (
        "--lr-scheduler polynomial_decay --total-num-update 0",
        "--total-num-update 0.*: must be positive",
    ),
    "restore text": ("--restore-file {checkpoints}/text.pt", "text.pt: not a checkpoint"),
    "restore half": ("--restore-file {checkpoints}/truncated.pt", "truncated.pt: not a checkp"),
    "restore malicious": ("--restore-file {checkpoints}/malicious.pt", "malicious.pt: not a"),
    "restore another family": (
        "--restore-file {checkpoints}/TransformerXL.pt",
        "the checkpoint is of another model or other sizes",
    ),
    "drop state": (
        "--drop-state-probability 1.5",
        "--drop-state-probability 1.5: must be from 0 to 1",
    ),
    "drop no state": (
        "--drop-state-probability 0.1 --random-windows",
        "--drop-state-probability 0.1: has no use with --random-windows",
    ),
    "restore another size": (
        "--restore-file {checkpoints}/SHARNN.pt --width 24",
        "the checkpoint is of another model or other sizes",
    ),
}

OF_OTHER_FAMILIES = {
    "heads": ("TransformerXL", "--n-head 3", "--n-head 3: does not divide --width 16"),
    "span heads": ("AdaptiveSpan", "--n-head 5", "--n-head 5: does not divide --width 16"),
    "criterion": (
        "AdaptiveSpan",
        "--criterion cross_entropy",
        "--criterion cross_entropy: would leave out .* use cross_entropy_with_auxiliary_losses",
    ),
    "drop state of windows": (
        "SparseTransformer",
        "--drop-state-probability 0.1",
        "--drop-state-probability 0.1: --arch sparse_transformer carries no state in training",
    ),
    "odd width": ("TransformerXL", "--width 15 --n-head 3", "--width 15: must be even"),
    "memory": ("TransformerXL", "--mem-len -1", "--mem-len -1: must be at least"),
    "span": ("AdaptiveSpan", "--attn-span 0", "--attn-span 0: must be at least 1"),
    "projection": ("SRUpp", "--projection 0", "--projection 0: must be at least 1"),
    "expansion": ("MinRNN", "--expansion 0", "--expansion 0"),
    "layers": ("MinRNN", "--num-layers -2", "--num-layers -2: must be at least 1"),
}

EVALUATION = {
    "no checkpoint": ("none.pt", "", "none.pt: no such file"),
    "text": ("text.pt", "", "text.pt: not a checkpoint"),
    "empty": ("empty.pt", "", "empty.pt: not a checkpoint"),
    "half": ("truncated.pt", "", "truncated.pt: not a checkpoint"),
    "foreign": ("foreign.pt", "", "foreign.pt: (not a checkpoint|holds no model)"),
    "malicious": ("malicious.pt", "", "malicious.pt: not a checkpoint"),
    "no such split": ("SHARNN.pt", "--gen-subset tset", "tset.idx: no such file"),
    "context": ("SHARNN.pt", "--context-window 5", "--context-window has no use here"),
    "no streams": ("SHARNN.pt", "--batch-size 0", "--batch-size 0: must be at least 1"),
}


def message_of(module, data, words, monkeypatch):
    """Run a command in this process; returns the one line that the interpreter would print."""
    user_dir = ["--user-dir", str(REPOSITORY / "fairseq_sha"), "--task", "byte_language_modeling"]
    monkeypatch.setattr(sys, "argv", [module, str(data), *user_dir, *words.split()])
    __import__(f"fairseq_cli.{module}")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        sys.modules[f"fairseq_cli.{module}"].cli_main()
    message = errors.user_message(caught.value)
    assert message is not None, repr(caught.value)
    assert "\n" not in message
    return message


def check(message, expected):
    assert re.search(expected, message), message


@pytest.mark.parametrize("case", DATA)
def test_data(good, tmp_path, monkeypatch, case):
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    spoil, expected = DATA[case]
    spoil(folder)
    message = message_of("train", folder, f"{TRAIN} --save-dir {tmp_path}/out", monkeypatch)
    check(message, expected)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("case", OPTIONS)
def test_options(good, checkpoints, tmp_path, monkeypatch, case):
    words, expected = OPTIONS[case]
    words = words.format(checkpoints=checkpoints)
    check(
        message_of("train", good, f"{TRAIN} --save-dir {tmp_path}/out {words}", monkeypatch),
        expected,
    )
    assert not list(tmp_path.glob("out/*")) and not (checkpoints / "ran").exists()


@pytest.mark.parametrize("case", OF_OTHER_FAMILIES)
def test_options_of_other_families(good, tmp_path, monkeypatch, case):
    family, words, expected = OF_OTHER_FAMILIES[case]
    words = f"{FAMILIES[family]} {words} --max-update 3 --save-dir {tmp_path}/out"
    check(message_of("train", good, words, monkeypatch), expected)


@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation(good, checkpoints, monkeypatch, case):
    name, words, expected = EVALUATION[case]
    words = f"--path {checkpoints / name} --cpu {words}"
    check(message_of("eval_lm", good, words, monkeypatch), expected)
    assert not (checkpoints / "ran").exists()


def test_data_of_another_vocabulary(good, checkpoints, tmp_path, monkeypatch):
    """One of the same size too, of which nothing else would tell."""
    words = f"--path {checkpoints / 'SHARNN.pt'} --cpu"
    folder = tmp_path / "larger"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        write_split(bytes(range(100)) * 9, folder, split)
    check(message_of("eval_lm", folder, words, monkeypatch), "trained with another dictionary")
    folder = tmp_path / "permuted"
    shutil.copytree(good, folder)
    lines = (folder / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    check(
        message_of("eval_lm", folder, words, monkeypatch),
        "trained with another dictionary, in which token 4 was",
    )
    words = f"{TRAIN} --save-dir {tmp_path}/out"
    for option in ("--restore-file", "--finetune-from-model", "--reset-dataloader --restore-file"):
        argv = f"{words} {option} {checkpoints / 'SHARNN.pt'}"
        check(message_of("train", folder, argv, monkeypatch), "trained with another dictionary")
    with pytest.raises(UserError, match="another dictionary"):
        SHARNN.from_pretrained(str(checkpoints), "SHARNN.pt", str(folder))


def test_errors_of_workers_that_fairseq_starts_are_found_in_their_tracebacks():
    class ProcessRaisedException(Exception):
        """As torch.multiprocessing has it: another process's traceback, as text."""

    traceback = """

-- Process 0 terminated with the following error:
Traceback (most recent call last):
  File "trainer.py", line 1, in load_checkpoint
{}: the first

During handling of the above exception, another exception occurred:

{}: the last
"""
    ours = "fairseq_sha.errors.UserError"
    cases = (
        ("ValueError", ours, "the last"),
        (ours, "Exception", "the first"),
        ("KeyError", "FileNotFoundError", None),
        ("AssertionError", "fairseq_sha_errors_UserError", None),
    )
    for first, last, expected in cases:
        error = ProcessRaisedException(traceback.format(first, last))
        assert errors.user_message(error) == expected


def test_errors_in_other_code_keep_their_traceback():
    def fails():
        raise ValueError("not an error of ours")

    with pytest.raises(ValueError) as caught:
        fails()
    assert errors.user_message(caught.value) is None


def test_parts_that_are_to_be_combined_are_refused(good, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    write_part("valid1")(folder)
    words = f"{TRAIN} --save-dir {tmp_path}/out"
    message = message_of("train", folder, f"{words} --combine-valid-subsets", monkeypatch)
    check(message, "valid1.idx: a second part of valid")
    for more in ("--ignore-unused-valid-subsets", "--valid-subset valid,valid1"):
        options = f"{TRAIN} --save-dir {tmp_path}/{more.count('1')} {more}"
        done = command("fairseq-train", folder, options)
        assert done.returncode == 0, done.stdout
        assert ("valid on 'valid1' subset" in done.stdout) == ("valid1" in more)


def test_model_that_is_no_language_model_is_refused(good, tmp_path, monkeypatch):
    words = f"--arch lstm --batch-size 4 --cpu --optimizer sgd --lr 0.1 --save-dir {tmp_path}"
    check(message_of("train", good, words, monkeypatch), "--arch lstm: not a language model")


def test_list_of_folders_is_refused(good, tmp_path, monkeypatch):
    message = message_of("train", f"{good}:{good}", f"{TRAIN} --save-dir {tmp_path}", monkeypatch)
    check(message, "a list of folders; name one")


def test_whole_traceback_on_demand(good, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_SHA_TRACEBACK", "1")
    argv = ["fairseq-train", good, "--user-dir", "fairseq_sha", "--task", "byte_language_modeling"]
    words = f"{TRAIN} --save-dir {tmp_path} --window 3"
    done = subprocess.run(
        [Path(sys.executable).parent / argv[0], *argv[1:], *words.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr and "--window 3: below" in done.stderr.splitlines()[-1]


def test_corpus_shorter_than_a_segment_is_no_mistake(good, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    write_tiny_split(30)(folder)
    done = command("fairseq-train", folder, f"{TRAIN} --save-dir {tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout
    assert "num_updates 3" in done.stdout


@pytest.mark.parametrize(
    "name, words, expected",
    [
        ("fairseq-train", "--window 3", "--window 3: below --tokens-per-sample 40"),
        ("fairseq-train", "--arch sha_rn", "argument --arch.*invalid choice: 'sha_rn'"),
        ("fairseq-train", "--cell gru", "argument --cell: invalid choice: 'gru'"),
        ("fairseq-train", "--restore-file {checkpoints}/malicious.pt", "malicious.pt: not a check"),
        ("fairseq-train", "--restore-file {checkpoints}/TransformerXL.pt", "of another model"),
        ("fairseq-train", "--save-dir {checkpoints}/text.pt", "text.pt"),
        ("fairseq-eval-lm", "--path {checkpoints}/none.pt", "none.pt"),
        ("fairseq-eval-lm", "--path {checkpoints}/text.pt", "text.pt: not a checkpoint"),
        ("fairseq-eval-lm", "--path {checkpoints}/malicious.pt", "malicious.pt: not a checkpoint"),
        ("fairseq-eval-lm", "--path {checkpoints}/SHARNN.pt --gen-subset x", "x.idx: no such file"),
        ("fairseq-validate", "--path {checkpoints}/truncated.pt", "truncated.pt: not a checkpoint"),
        (
            "fairseq-generate",
            "--path {checkpoints}/SHARNN.pt --gen-subset x",
            "x.idx: no such file",
        ),
    ],
)
def test_commands_end_with_one_line(good, checkpoints, tmp_path, name, words, expected):
    words = words.format(checkpoints=checkpoints)
    shared = f"{TRAIN} --save-dir {tmp_path}" if name == "fairseq-train" else "--cpu --batch-size 2"
    done = command(name, good, f"{shared} {words}")
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stdout
    check(done.stdout.strip().splitlines()[-1], f"error: .*{expected}")
    assert not (checkpoints / "ran").exists()


# Readers of files, given random and mutated bytes: the right content, or a UserError.

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
mutations = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


def mutate(data, changes, size):
    data = bytearray(data[: size % (len(data) + 1)] if size % 3 == 0 else data)
    for offset, value in changes:
        if data:
            data[offset % len(data)] = value
    return bytes(data)


def accepted(read, path, contents):
    """What a reader makes of each content of a file that it does not refuse, in one line."""
    for content in contents:
        path.write_bytes(content)
        try:
            result = read(str(path))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            yield result


@fuzz
@given(noise=st.binary(max_size=300), changes=mutations, size=st.integers(0, 10**6))
def test_dictionary_reader(good, tmp_path, noise, changes, size):
    contents = (noise, mutate((good / "dict.txt").read_bytes(), changes, size))
    for dictionary in accepted(ByteDictionary.load, tmp_path / "dict.txt", contents):
        values = [value for value in dictionary.bytes_by_id() if value is not None]
        assert len(values) == len(set(values)) and all(0 <= value < 256 for value in values)


@fuzz
@given(noise=st.binary(max_size=300), changes=mutations, size=st.integers(0, 10**6))
def test_index_reader(good, tmp_path, noise, changes, size):
    tokens = np.fromfile(good / "train.bin", np.uint16)
    shutil.copyfile(good / "train.bin", tmp_path / "train.bin")
    contents = (noise, mutate((good / "train.idx").read_bytes(), changes, size))
    for corpus in accepted(lambda path: Corpus(path[:-4]), tmp_path / "train.idx", contents):
        # Other lengths of lines, or another type of the same size, leave the size in bytes.
        assert corpus.tokens.tobytes() == tokens.tobytes()
        assert corpus.total_tokens == len(corpus.tokens)


@fuzz
@given(noise=st.binary(max_size=100), changes=mutations, size=st.integers(0, 10**6))
def test_symbols_reader(tmp_path, noise, changes, size):
    contents = (noise, mutate(b"10\n97\n98\n255\n", changes, size))
    for symbols in accepted(read_symbols, tmp_path / "symbols.txt", contents):
        assert len(symbols) == len(set(symbols)) and all(
            symbol == "</s>" or 0 <= int(symbol) < 256 for symbol in symbols
        )


@fuzz
@given(noise=st.binary(max_size=300), changes=mutations, size=st.integers(0, 10**6))
def test_weights_reader(tmp_path, noise, changes, size):
    expected = torch.arange(6.0).view(2, 3)
    torch.save({"a.weight": expected}, tmp_path / "whole.pt")
    contents = (noise, mutate((tmp_path / "whole.pt").read_bytes(), changes, size))
    for weights in accepted(read_weights, tmp_path / "weights.pt", contents):
        assert list(weights) == ["a.weight"] and torch.equal(weights["a.weight"], expected)
