"""The compiled form is the numpy form, bit for bit, wherever it runs; both code without loss."""

import hashlib
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from fairseq_sha import UserError, portable
from fairseq_sha.portable import coder, numpy_form
from fairseq_sha.portable import model as model_file
from fairseq_sha.portable.numpy_form import NumpyForm, Reader
from tests.commands import REPOSITORY
from tests.portable.helpers import MODELS, integer_model, text

numba_form = pytest.importorskip("fairseq_sha.portable.numba_form")

#: With bytes that the models do not know, at the beginning and in a row.
MIXED = b"\xffabc" + text(90) + bytes(range(100, 140)) + text(57, 3)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return integer_model(**MODELS[request.param])


@pytest.mark.parametrize("streams", [1, 3, 20])
def test_forms_pack_the_same_and_restore_every_byte(model, streams):
    fast, plain = (portable.PortableModel(model, form) for form in (None, NumpyForm))
    for data in (b"", b"a", b"\x00", MIXED):
        packed = fast.encode(data, streams)
        assert plain.encode(data, streams) == packed
        assert fast.decode(packed, len(data), streams) == data
        assert plain.decode(packed, len(data), streams) == data


@pytest.mark.parametrize("streams", [1, 5])
def test_forms_have_the_same_state(model, streams):
    data = np.frombuffer(MIXED[: 25 * streams], np.uint8)
    reader = Reader(model, streams)
    before = np.full(streams, coder.FIRST)
    for now in data.reshape(streams, -1).T:
        frequencies = reader.frequencies(reader.step(before))
        reader.count(now)
        before = now
    network, state = numba_form.network(model), numba_form.start(model, streams)
    state.coder[1] = 1 << coder.CODE_BITS
    payload, nothing = np.zeros(1000, np.uint8), np.zeros(0, np.int64)
    numba_form.run(
        network, state, numba_form.ENCODE, data.copy(), 25, payload, nothing, 1 << 16, 25
    )
    for ours, theirs in ((state.h, reader.h), (state.c, reader.c)):
        np.testing.assert_array_equal(ours[:, :, :streams], theirs.transpose(0, 2, 1))
    memory = state.memory[:, :streams, : model.sizes.window, : model.sizes.width]
    np.testing.assert_array_equal(memory, reader.memory)
    np.testing.assert_array_equal(state.counts[:, :streams], [reader.read, reader.unknown])
    np.testing.assert_array_equal(state.frequencies, frequencies[-1])
    assert np.abs(reader.h).max() + np.abs(reader.c).max() > 0


def test_frequencies_are_positive_and_sum_up(model):
    reader = Reader(model, 3)
    tables = []
    for now in np.frombuffer(MIXED[:60], np.uint8).reshape(20, 3):
        tables.append(reader.frequencies(reader.step(now)))
        reader.count(now)
    tables = np.array(tables)
    assert tables.min() >= 1 and (tables.sum(-1) == 1 << model_file.TOTAL_BITS).all()


def test_size_is_what_the_frequencies_promise(model):
    data, reader, before, bits = MIXED, Reader(model, 1), np.array([coder.FIRST]), 0.0
    for byte in data:
        table = reader.frequencies(reader.step(before))
        bits -= math.log2(table[0, byte] / (1 << model_file.TOTAL_BITS))
        before = np.array([byte])
        reader.count(before)
    size = 8 * len(portable.PortableModel(model).encode(data, 1))
    assert bits - 1 < size < 1.001 * bits + 24


def test_any_payload_decodes_to_something(model):
    fast, plain = (portable.PortableModel(model, form) for form in (None, NumpyForm))
    packed = bytearray(fast.encode(MIXED, 2))
    packed[len(packed) // 2] ^= 64
    for payload in (b"", b"\xff" * 50, b"\x00" * 9, bytes(range(7, 87)), packed):
        decoded = fast.decode(payload, 90, 2)
        assert len(decoded) == 90 and decoded == plain.decode(payload, 90, 2)


def test_numbers_of_streams(model):
    ours = portable.PortableModel(model)
    # More streams than bytes are no other packing than as many as there are bytes.
    assert ours.encode(b"abc", 64) == ours.encode(b"abc", 3)
    for streams in (0, -1, 65536):
        with pytest.raises(UserError, match=f"--streams {streams}"):
            ours.encode(b"abc", streams)


def test_progress_is_told_every_byte(model):
    for form in (None, NumpyForm):
        told = []
        portable.PortableModel(model, form).encode(MIXED, 4, told.append)
        assert sum(told) == len(MIXED)


def test_generation_is_the_same_and_follows_its_seed(model):
    fast, plain = (portable.PortableModel(model, form) for form in (None, NumpyForm))
    drawn = fast.generate(b"abc", 60, 7, 0.9)
    assert drawn == plain.generate(b"abc", 60, 7, 0.9) == fast.generate(b"abc", 60, 7, 0.9)
    assert drawn != fast.generate(b"abc", 60, 8, 0.9)
    assert len(drawn) == 60 and set(drawn) <= set(model.sizes.known)
    assert len(fast.generate(b"", 3)) == 3 and fast.generate(b"abc", 0) == b""
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="--temperature"):
            fast.generate(b"", 1, 1, temperature)


def test_low_temperature_takes_the_most_probable(model):
    ours, out = portable.PortableModel(model), b""
    reader, before = Reader(model, 1), np.array([coder.FIRST])
    for _ in range(20):
        before = np.array([model.sizes.known[int(reader.step(before)[0].argmax())]])
        out += bytes(before.tolist())
    assert ours.generate(b"", 20, 1, 0.01) == out


# Elsewhere.

PACK = """
import hashlib, sys
from pathlib import Path
from fairseq_sha import portable
model = portable.load(sys.argv[1])
data = Path(sys.argv[2]).read_bytes()
packed = model.encode(data, 3)
assert model.decode(packed, len(data), 3) == data
assert not {"torch", "fairseq"} & set(sys.modules)
print(hashlib.sha256(packed).hexdigest(), model._form.__class__.__name__)
"""


def digest_elsewhere(tmp_path, model, **environment):
    model_file.write(tmp_path / "model.shai", model.sizes, model.arrays)
    (tmp_path / "text").write_bytes(MIXED)
    done = subprocess.run(
        [sys.executable, "-c", PACK, str(tmp_path / "model.shai"), str(tmp_path / "text")],
        env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode().split()


def digest_here(model):
    return hashlib.sha256(portable.PortableModel(model).encode(MIXED, 3)).hexdigest()


def test_another_number_of_threads_packs_the_same(tmp_path):
    model = integer_model(**MODELS["lstm"])
    threads = {"NUMBA_NUM_THREADS": "3", "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    assert digest_elsewhere(tmp_path, model, **threads) == [digest_here(model), "NumbaForm"]


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_plain_processor_packs_the_same(tmp_path, name):
    model = integer_model(**MODELS[name])
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert digest_elsewhere(tmp_path, model, **plain) == [digest_here(model), "NumbaForm"]


def test_without_numba_it_says_that_it_is_slow(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    model = portable.PortableModel(integer_model(**MODELS["min_gru"]))
    assert isinstance(model._form, NumpyForm)
    assert "pip install 'fairseq-sha[portable]'" in caplog.text


# The arithmetic.


def test_shifts_round_down():
    x = np.array([[-9, -8, -1, 0, 1, 7, 8]], np.int64)
    assert (x >> 3).tolist() == [[-2, -1, -1, 0, 0, 0, 1]]
    assert numpy_form.narrow(x, 3, 100).tolist() == [[-1, -1, 0, 0, 0, 1, 1]]
    assert numpy_form.narrow(100 * x, 3, 100).tolist() == [[-100, -100, -12, 0, 13, 88, 100]]


def test_square_roots_are_exact():
    roots = [0, 1, 2, 3, 1000, 2**15, 2**30 - 1, 2**31 - 1]
    numbers = sorted({max(0, root * root + d) for root in roots for d in (-1, 0, 1)})
    draw = random.Random(1)
    numbers += [draw.randrange(2**62 - 1) for _ in range(200)]
    got = numpy_form.isqrt(np.array(numbers, np.int64))
    assert got.tolist() == [math.isqrt(number) for number in numbers]


def test_layer_norm_is_that_of_real_numbers():
    model = integer_model(**MODELS["lstm"])
    reader, one = Reader(model, 1), 1 << model.sizes.fraction
    x = np.random.RandomState(1).randn(5, model.sizes.width) * 3 + 1
    weights = model.arrays.start_norm[0]
    got = reader._norm(np.rint(x * one).astype(np.int64), weights) / one
    weight, bias = weights[0] / 2**16, weights[1] / 2**32
    normal = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    np.testing.assert_allclose(got, normal * weight + bias, atol=1e-3)


def test_carries_go_into_bytes_that_are_out():
    # The last interval over and over leaves low at its end, so that the next one carries far.
    total = 1 << model_file.TOTAL_BITS
    encoder, intervals = coder.Encoder(), [(total - 1, 1)] * 9 + [(0, total - 1), (total // 2, 3)]
    for _ in range(40):
        for interval in intervals:
            encoder.put(*interval)
    decoder = coder.Decoder(encoder.finish())
    for _ in range(40):
        for first, frequency in intervals:
            assert first <= decoder.where() < first + frequency
            decoder.take(first, frequency)
