"""Sizes against the libraries themselves, and priming against a slow, obvious form."""

import bz2
import gzip
import json
import lzma
import random
import time

import pytest

from fairseq_sha import UserError
from fairseq_sha.compare import compressors
from fairseq_sha.compare.compressors import COMPRESSORS, Compressor, part_read, rows
from fairseq_sha.data.segments import stream_bounds
from tests.tiny_corpus import text

TRAIN, TEST = text(20_000, 1), text(5000, 2)


def with_brotli(data):
    return pytest.importorskip("brotli").compress(data, quality=11, lgwin=24)


def with_zstd(data):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(level=22).compress(data)


def with_ppmd(data, variant):
    pyppmd = pytest.importorskip("pyppmd")
    return pyppmd.compress(data, max_order=16, mem_size=1 << 28, variant=variant)


def with_zpaq(data):
    return pytest.importorskip("zpaq").compress(data, level=5, threads=1, hints=False)


#: The same by what each library offers for simple use.
SIMPLE = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "brotli": with_brotli,
    "zstd": with_zstd,
    "ppmd-h": lambda data: with_ppmd(data, "H"),
    "ppmd-i": lambda data: with_ppmd(data, "I"),
    "zpaq": with_zpaq,
}


@pytest.mark.parametrize("key", COMPRESSORS)
def test_bits_are_those_of_the_library(key):
    both, test, train = (len(SIMPLE[key](data)) for data in (TRAIN + TEST, TEST, TRAIN))
    alone, primed = rows(TRAIN, TEST, only=[key])
    assert (alone["primed_with"], primed["primed_with"]) == (0, len(TRAIN))
    # Library defaults may add some bytes of header or checksum.
    assert 5000 * alone["bits"] / 8 == pytest.approx(test, abs=16)
    assert 5000 * primed["bits"] / 8 == pytest.approx(both - train, abs=16)
    assert primed["name"] == COMPRESSORS[key].name and primed["seconds"] >= 0
    assert primed["version"].split()[0] in ("Python", COMPRESSORS[key].package)


@pytest.mark.parametrize("key", [key for key in COMPRESSORS if key not in ("gzip", "bzip2")])
def test_text_that_was_read_before_costs_little(key):
    """Random bytes. gzip does not reach so far back; bzip2 sorts, and profits less."""
    if not COMPRESSORS[key].installed:
        pytest.skip(f"{COMPRESSORS[key].package} is not installed")
    source = random.Random(1)
    test = bytes(source.randrange(256) for _ in range(20_000))
    train = test + bytes(source.choices(b"abcd", k=100_000))
    alone, primed = rows(train, test, only=[key])
    assert alone["bits"] > 7.9 and primed["bits"] < 1


def entropy_coder(data):
    """Two bytes for each byte that was not seen before, one for others."""
    return sum(1 if byte in data[:i] else 2 for i, byte in enumerate(data))


@pytest.fixture
def only_own(monkeypatch):
    calls = []

    def size(data):
        calls.append(data)
        return entropy_coder(data)

    own = Compressor("own", "own, best", size)
    monkeypatch.setattr(compressors, "COMPRESSORS", {"own": own})
    return calls


def test_priming(only_own):
    """abc was read, so of abcd only the d is new."""
    results = rows(b"xabcx", b"abcd", primed_with=(5, 0, 3, 900))
    assert [row["primed_with"] for row in results] == [0, 3, 5]
    assert [row["bits"] for row in results] == [8 * 8 / 4, 8 * 6 / 4, 8 * 5 / 4]


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 29, 30, 31, 99])
def test_part_read_is_what_training_reads_first(count, streams):
    train = bytes(range(30))
    bounds = stream_bounds(len(train), streams)
    read, position = set(), 0
    while len(read) < min(count, len(train)):  # side by side, byte after byte
        for start, end in zip(bounds, bounds[1:]):
            if start + position < end and len(read) < count:
                read.add(start + position)
        position += 1
    assert part_read(train, count, streams) == bytes(sorted(read))


@pytest.mark.parametrize("count, streams, message", [(-1, 1, "^-1 bytes of"), (5, 0, "^0 streams")])
def test_impossible_parts(count, streams, message):
    with pytest.raises(UserError, match=message):
        part_read(TRAIN, count, streams)


def test_cache_saves_the_work(only_own, tmp_path):
    path = tmp_path / "sizes.json"
    first = rows(b"aab", b"abc", cache=path)
    assert only_own == [b"abc", b"aab", b"aababc"]
    assert rows(b"aab", b"abc", cache=path) == first
    assert len(only_own) == 3
    rows(b"aab", b"abd", primed_with=[3], cache=path)
    assert only_own[3:] == [b"aababd"]
    assert len(json.loads(path.read_text())) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["sizes.json"]


def test_cache_forgets_other_versions(only_own, tmp_path, monkeypatch):
    rows(b"", b"abc", cache=tmp_path / "sizes.json")
    monkeypatch.setattr(compressors.platform, "python_version", lambda: "9.9")
    (row,) = rows(b"", b"abc", cache=tmp_path / "sizes.json")
    assert row["version"] == "Python 9.9" and len(only_own) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1]}'])
def test_cache_that_is_none(only_own, tmp_path, content):
    (tmp_path / "other").write_text(content)
    with pytest.raises(UserError, match="other: not a cache of compressed sizes"):
        rows(b"", b"abc", cache=tmp_path / "other")
    assert (tmp_path / "other").read_text() == content


def test_names_that_are_not_known():
    with pytest.raises(UserError, match="^zip: no such compressor; known are gzip, bzip2, xz, "):
        rows(TRAIN, TEST, only=["xz", "zip"])


def test_nothing_to_compress():
    with pytest.raises(UserError, match="is empty"):
        rows(TRAIN, b"")


def test_missing_libraries_are_left_out_and_named(monkeypatch):
    find = compressors.importlib.util.find_spec
    monkeypatch.setattr(
        compressors.importlib.util,
        "find_spec",
        lambda name: None if name in ("pyppmd", "zpaq") else find(name),
    )
    results = rows(TRAIN, TEST, [0], only=["gzip", "ppmd-i", "zpaq"])
    assert [row["name"] for row in results] == ["gzip -9"]
    line = compressors.missing(["gzip", "ppmd-i", "zpaq"])
    assert line == (
        "not installed: PPMd variant I, order 16; ZPAQ, method 5; "
        "pip install 'fairseq-sha[compare]'"
    )
    assert compressors.missing(["gzip"]) is None


def test_slow_ones_show_progress(only_own, monkeypatch):
    monkeypatch.setattr(compressors, "PROGRESS_SECONDS", 0.01)
    slow = compressors.COMPRESSORS["own"]._replace(size=lambda data: time.sleep(0.2) or 1)
    monkeypatch.setitem(compressors.COMPRESSORS, "own", slow)
    lines = []
    rows(b"", b"abc", progress=lines.append)
    assert lines and all(line.startswith("own, best: 3 bytes, ") for line in lines)


@pytest.mark.parametrize(
    "error, expected, message",
    [
        (MemoryError(), UserError, "^own, best: not enough memory for 3 bytes"),
        (RuntimeError("broken"), RuntimeError, "broken"),
    ],
)
def test_failure_of_a_library_is_not_hidden(only_own, monkeypatch, error, expected, message):
    def fail(data):
        raise error

    failing = compressors.COMPRESSORS["own"]._replace(size=fail)
    monkeypatch.setitem(compressors.COMPRESSORS, "own", failing)
    with pytest.raises(expected, match=message):
        rows(b"", b"abc")


def test_table_begins_with_the_best():
    results = [
        dict(name=name, primed_with=count, bits=bits, seconds=1.25, version="")
        for name, count, bits in [("a", 0, 2), ("a", 9, 1.9), ("b", 0, 3), ("b", 9, 1)]
    ]
    lines = compressors.table(results, 9).splitlines()
    assert "bits per byte, alone | bits per byte, after all 9 bytes of train |" in lines[0]
    assert lines[2:] == ["| b | 3.000 | 1.000 | 1.2 | 1.2 |", "| a | 2.000 | 1.900 | 1.2 | 1.2 |"]
