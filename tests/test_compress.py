"""Compressed files come back bit for bit, or not at all."""

import os
import platform
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import fairseq_sha
from fairseq_sha import UserError, commands, compression, packed_file
from fairseq_sha.data.codecs import WordCodec
from fairseq_sha.trained_model import TrainedModel
from tests.commands import REPOSITORY
from tests.options import FAMILIES
from tests.tiny_corpus import text, write_folder


@pytest.fixture(params=FAMILIES)
def model(request, checkpoints):
    return TrainedModel.load(checkpoints[request.param], cpu=True)


@pytest.fixture
def path(checkpoints):
    return str(checkpoints["SHARNN"])


@pytest.fixture
def sha_rnn(path):
    return TrainedModel.load(path, cpu=True)


@pytest.mark.parametrize("streams", [None, 1, 3])
def test_files_come_back_bit_for_bit(model, streams):
    known = text(331, seed=6)
    for data in (b"", b"a", b"\xff", known, b"\x00\xffz" + known[:40] + bytes(range(256))):
        assert compression.decompress(model, compression.compress(model, data, streams)) == data


def test_size_is_what_the_bits_promise(sha_rnn):
    data = text(6001, seed=6)
    promised = sum(sha_rnn.bits(part).sum() for part in (data[:3001], data[3001:]))
    packed = compression.compress(sha_rnn, data, streams=2)
    size = struct.unpack_from("<I", packed, 38 + 12)[0]
    assert 8 * size < promised * 1.005 + 48
    assert len(packed) - size < 100 and len(compression.compress(sha_rnn, b"")) < 64


def test_both_ways_use_the_given_threads(sha_rnn, monkeypatch):
    before, seen, read = torch.get_num_threads(), set(), sha_rnn.read

    def counting_read(*args):
        seen.add(torch.get_num_threads())
        return read(*args)

    monkeypatch.setattr(sha_rnn, "read", counting_read)
    data = text(300)
    packed = compression.compress(sha_rnn, data, threads=before + 1)
    assert compression.decompress(sha_rnn, packed) == data
    assert seen == {before + 1} and torch.get_num_threads() == before


@pytest.mark.parametrize("lacking", [0, 1])
def test_model_that_knows_almost_all_bytes(sha_rnn, lacking):
    """Its dictionary is widened, and its weights with it."""
    dictionary, decoder = sha_rnn.dictionary, sha_rnn.decoder
    known = {value for value in dictionary.bytes_by_id() if value is not None}
    for value in sorted(set(range(256)) - known)[lacking:]:
        dictionary.add_symbol(str(value))
    more = len(dictionary) - len(decoder.embedding.weight)
    decoder.embedding.weight.data = torch.nn.functional.pad(
        decoder.embedding.weight.data, (0, 0, 0, more)
    )
    decoder.head.bias.data = torch.nn.functional.pad(decoder.head.bias.data, (0, more))
    data = bytes(range(256)) + b"\x00\x00abc"
    assert compression.decompress(sha_rnn, compression.compress(sha_rnn, data)) == data


def test_model_trained_in_half_precision_is_used_in_single(path, tmp_path):
    state = torch.load(path, weights_only=True)
    state["cfg"]["common"]["bf16"] = True
    state["model"] = {name: tensor.bfloat16() for name, tensor in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    model = TrainedModel.load(tmp_path / "half.pt", cpu=True)
    assert next(model.parameters()).dtype == torch.float32
    data = text(300)
    assert compression.decompress(model, compression.compress(model, data)) == data


def test_numbers_are_checked_before_the_work(sha_rnn):
    for numbers in ({"streams": 0}, {"streams": 1025}, {"threads": 0}):
        with pytest.raises(UserError, match="must be from 1 to"):
            compression.compress(sha_rnn, b"abc", **numbers)


def test_what_cannot_be_brought_back_is_refused(sha_rnn, checkpoints):
    packed = compression.compress(sha_rnn, text(500))
    for damaged in (packed[:-1], packed[:20], packed[:5], packed + b"x", b"", b"SHAC"):
        with pytest.raises(UserError, match="cut off|not a file that|after the end"):
            compression.decompress(sha_rnn, damaged)
    for at in range(0, len(packed), 7):
        damaged = bytearray(packed)
        damaged[at] ^= 16
        with pytest.raises(UserError, match="damaged|cut off|not a file that|another version"):
            compression.decompress(sha_rnn, bytes(damaged))
    other = TrainedModel.load(checkpoints["MinRNN"], cpu=True)
    with pytest.raises(UserError, match="another model"):
        compression.decompress(other, packed)


def test_payload_that_no_coder_wrote(sha_rnn):
    """Whatever it is, decoding ends, with something wrong or with a ValueError."""
    coder = compression.ModelCoder(sha_rnn)
    payload = coder.encode(text(200), 2)
    assert coder.decode(payload, 200, 2) == text(200)
    rng = random.Random(1)
    for size in (*range(12), *[4 * n + 2 for n in range(3, 33)]):
        wrong = payload[:2] + bytes(rng.choices(range(256), k=max(0, size - 2)))
        for content in (wrong[:size], payload[:size]):
            try:
                assert len(coder.decode(content, 200, 2)) in (0, 200)
            except ValueError as error:
                assert str(error) == "not a packed block" and size % 4 != 2  # noqa: PT017
    for threads in (b"\x00\x00", b"\xff\xff"):
        with pytest.raises(ValueError, match="not a packed block"):
            coder.decode(threads + payload[2:], 200, 2)


def test_last_digits_that_differ_are_noticed(sha_rnn, monkeypatch):
    packed = compression.compress(sha_rnn, text(500))
    read = sha_rnn.read
    monkeypatch.setattr(sha_rnn, "read", lambda *args: (read(*args)[0] * 1.001, read(*args)[1]))
    with pytest.raises(UserError, match="other last digits here; use the machine"):
        compression.decompress(sha_rnn, packed)


@pytest.mark.parametrize(
    "module, name, value",
    [
        (fairseq_sha, "__version__", "99"),
        (np, "__version__", "99"),
        (torch.__config__, "show", lambda: "another build"),
        (compression, "processor", lambda: "another processor"),
    ],
)
def test_identity_of_the_build(sha_rnn, monkeypatch, module, name, value):
    before = compression.identity_of_build(sha_rnn)
    assert before == compression.identity_of_build(sha_rnn)
    monkeypatch.setattr(module, name, value)
    assert compression.identity_of_build(sha_rnn) != before


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo, which Linux has")
def test_processor_is_described(monkeypatch):
    described = compression.processor()
    assert described == compression.processor() and platform.machine() in described
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search(r"^(model name|CPU part)\s*: (.+)$", file.read(), re.MULTILINE)
    assert model and model[2] in described


def test_codec_must_bring_back_every_byte(sha_rnn):
    packed = compression.compress(sha_rnn, b"abc")
    sha_rnn.task.codec = WordCodec(sha_rnn.dictionary)
    with pytest.raises(UserError, match="codec is words, which does not restore every byte"):
        compression.compress(sha_rnn, b"abc")
    with pytest.raises(UserError, match="codec is words, which does not restore every byte"):
        compression.decompress(sha_rnn, packed)


# The commands


@pytest.fixture
def files(tmp_path):
    contents = {"one": text(900), "two.txt": b"\xffabc", "three": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path, contents


def test_commands_compress_and_decompress(path, files, capsys):
    folder, contents = files
    paths = [str(folder / name) for name in contents]
    packed = [f"{file}.shac" for file in paths]
    assert commands.main(["compress", "--path", path, "--cpu", *paths]) == 0
    out = capsys.readouterr().out
    assert re.search(r"one: 900 to \d+ bytes, [0-9.]+ bits per byte\n", out)
    assert re.search(r"three: 0 to \d+ bytes\n", out)
    for file in paths:
        os.remove(file)
    assert commands.main(["decompress", "--path", path, "--cpu", *packed]) == 0
    assert re.search(r"one.shac: \d+ to 900 bytes\n", capsys.readouterr().out)
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    assert len(list(folder.iterdir())) == 6


def test_file_that_fails_is_named_and_the_rest_is_done(path, files, capsys):
    folder, contents = files
    (folder / "two.txt.shac").write_bytes(b"kept")
    paths = [str(folder / name) for name in ("missing", "one", "two.txt", "three", "three")]
    assert commands.main(["compress", "--path", path, "--cpu", *paths]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1 and printed.err.count("warning: ") == 2
    assert f"error: {folder}/missing: No such file or directory\n" in printed.err
    assert f"warning: {folder}/two.txt.shac: exists already" in printed.err
    assert f"warning: {folder}/three.shac: exists already" in printed.err
    assert printed.out.count(" bytes") == 2
    assert (folder / "two.txt.shac").read_bytes() == b"kept"

    (folder / "damaged.shac").write_bytes((folder / "one.shac").read_bytes()[:-3])
    os.remove(folder / "one")
    names = ("damaged.shac", "three", "three.shac", "one.shac", "missing.shac")
    paths = [str(folder / name) for name in names]
    assert commands.main(["decompress", "--path", path, "--cpu", *paths]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 2 and printed.err.count("warning: ") == 2
    assert f"error: {folder}/damaged.shac: cut off after the last block" in printed.err
    assert f"warning: {folder}/three: does not end in .shac" in printed.err
    assert f"warning: {folder}/three: exists already" in printed.err
    assert f"error: {folder}/missing.shac: No such file or directory\n" in printed.err
    assert (folder / "one").read_bytes() == contents["one"]
    assert not (folder / "damaged").exists()


def test_nothing_is_loaded_for_files_that_all_fail(files, capsys):
    folder, _ = files
    for command in ("compress", "decompress"):
        argv = [command, "--path", str(folder / "checkpoint.pt"), str(folder / "no.shac")]
        assert commands.main(argv) == 1
        assert capsys.readouterr().err == f"error: {folder}/no.shac: No such file or directory\n"


@pytest.mark.parametrize(
    "option, message",
    [
        (["--streams", "0"], "--streams 0: must be from 1 to 1024"),
        (["--block-size", "2G"], "--block-size 2147483648: must be from 64 to 1073741824"),
        (["--threads", "70000"], "--threads 70000: must be from 1 to 1024"),
    ],
)
def test_options_are_checked_before_the_work(option, message, capsys):
    assert commands.main(["compress", "--path", "checkpoint.pt", *option, "x"]) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_portable_model_packs_and_unpacks_without_torch(path, tmp_path):
    model = str(tmp_path / "model")
    data = write_folder(tmp_path)
    options = ["--path", path, "--data", data, "--out", model, "--sample", "0"]
    assert commands.main(["quantize", *options]) == 0
    # numba would compile for longer than it saves.
    code = (
        "import sys\n"
        "for name in ('torch', 'fairseq', 'constriction', 'numba'): sys.modules[name] = None\n"
        "from fairseq_sha.commands import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def run(command, content):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--path", model],
            input=content,
            capture_output=True,
            cwd=str(REPOSITORY),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    content = text(500) + bytes(range(256))
    packed = run("compress", content)
    assert packed[5] == packed_file.PORTABLE and run("decompress", packed) == content
