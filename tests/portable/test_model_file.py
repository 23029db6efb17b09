"""The file of a model in integers: read back, or refused in one line."""

import json
import zlib

import numpy as np
import pytest

from fairseq_sha import UserError, portable
from fairseq_sha.portable import model as form
from tests.portable.helpers import MODELS, integer_model


@pytest.fixture(scope="module")
def model():
    return integer_model(**MODELS["lstm"])


@pytest.fixture
def path(model, tmp_path):
    form.write(tmp_path / "model.shai", model.sizes, model.arrays)
    return tmp_path / "model.shai"


def rewrite(path, change):
    """Change the content and make its checksum right."""
    content = change(path.read_bytes()[: -form.CHECKSUM.size])
    path.write_bytes(content + form.CHECKSUM.pack(zlib.crc32(content)))


def with_header(content, **fields):
    start = len(form.MAGIC) + form.LENGTH.size
    (length,) = form.LENGTH.unpack(content[len(form.MAGIC) : start])
    header = {**json.loads(content[start : start + length]), **fields}
    header = json.dumps(header).encode()
    return form.MAGIC + form.LENGTH.pack(len(header)) + header + content[start + length :]


def test_comes_back(model, path):
    again = form.read(path)
    assert again.sizes == model.sizes and again.identity == model.identity
    for name, ours, theirs in zip(form.Arrays._fields, model.arrays, again.arrays):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert portable.is_portable_file(path) and portable.load(path).identity == model.identity
    assert len(model.identity) == 8
    assert not list(path.parent.glob("*.unfinished"))


def test_identity_is_that_of_the_content(model):
    changed = model.arrays._replace(sigmoid=model.arrays.sigmoid[::-1])
    assert form.unpack(form.pack(model.sizes, changed), "").identity != model.identity


def test_other_files_are_told_apart(tmp_path):
    for content in (b"", b"SH", b"PK\x03\x04" * 9):
        (tmp_path / "other").write_bytes(content)
        assert not portable.is_portable_file(tmp_path / "other")
        with pytest.raises(UserError, match="other: not a file of this version"):
            portable.load(tmp_path / "other")


def test_every_damaged_byte_is_noticed(path):
    content = path.read_bytes()
    for place in [*range(5, 60), *range(60, len(content), 997), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 16
        with pytest.raises(UserError, match="x: damaged"):
            form.unpack(bytes(damaged), "x")
    for size in (0, 5, 9, 100, len(content) - 1):
        with pytest.raises(UserError, match="x: damaged"):
            form.unpack(content[:size], "x")


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 23},
        {"width": 4096},
        {"width": 10**30},
        {"width": "24"},
        {"width": True},
        {"layers": 0},
        {"window": 1 << 17},
        {"fraction": 17},
        {"cell": "qrnn"},
        {"cell": "sru"},
        {"family": "transformer_xl"},
        {"attention_layers": [1, 1]},
        {"attention_layers": [2]},
        {"attention_layers": [0, 1]},
        {"attention_layers": None},
        {"known": []},
        {"known": [3, 256]},
        {"known": list(range(256))},
        {"ngram_orders": [2]},
        {"ngram_orders": [2], "ngram_buckets": 0},
        {"ngram_buckets": 4},
        {"ngram_orders": [1], "ngram_buckets": 4},
        {"ngram_orders": [2] * 9, "ngram_buckets": 4},
        {"ngram_orders": [2], "ngram_buckets": 1 << 25},
        {"more": 1},
    ],
    ids=str,
)
def test_headers_that_do_not_fit_are_refused(path, fields):
    rewrite(path, lambda content: with_header(content, **fields))
    with pytest.raises(UserError, match="model.shai: damaged"):
        portable.load(path)


def test_header_that_is_no_json_is_refused(path):
    for header in (b"[" * 5000, b"\xff", b"{}", b"[]", b'"family"'):
        packed = form.MAGIC + form.LENGTH.pack(len(header)) + header
        rewrite(path, lambda content, packed=packed: packed)
        with pytest.raises(UserError, match="model.shai: damaged"):
            portable.load(path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("cell_multiplier", -1),
        ("cell_multiplier", (1 << 28) + 1),
        ("boom_bias", 1 << 62),
        ("head_shift", 63),
        ("head_shift", -1),
        ("boom_shifts", 25),
        ("start_norm", 1 << 62),
        ("sigmoid", -1),
        ("exp", 1 << 24),
        ("exp", 5),  # the first entry is that of 0
        ("score_multiplier", 1 << 29),
        ("value_gate", 1 << 29),
    ],
)
def test_numbers_that_could_overflow_are_refused(model, name, value):
    array = getattr(model.arrays, name).copy()
    array.flat[0] = value
    content = form.pack(model.sizes, model.arrays._replace(**{name: array}))
    with pytest.raises(UserError, match="x: damaged"):
        form.unpack(content, "x")


def test_sums_of_products_fit_32_bits():
    weights = np.array([[[127] * 2048, [-127] * 2048], [[1] * 2048, [0] * 2048]], np.int8)
    limits = form.limits(weights)
    assert limits.tolist() == [(2**31 - 1) // (127 * 2048), 32767]
    for weight, limit in zip(weights, limits):
        assert (np.abs(weight.astype(object)).sum(1) * int(limit)).max() < 2**31
    assert form.MOST_MEMORY * form.query_limit(4096) * 4096 < 2**31
    assert form.MOST_MEMORY << form.MIX_BITS < 2**31
