"""The container of packed files: what it holds comes back, and damage costs the blocks it hits."""

import io
import random
import re
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sha import UserError, packed_file
from fairseq_sha.packed_file import BLOCK, END, HEADER, Reader
from tests.commands import REPOSITORY
from tests.stand_in_compress import StandInCoder, StoringCoder
from tests.tiny_corpus import text

SIZE = 1000
HEADER_SIZE, BLOCK_HEADER_SIZE, END_SIZE = HEADER.size + 4, BLOCK.size + 4, END.size + 4


def noise(size):
    return bytes(random.Random(1).choices(range(256), k=size))


#: Four blocks, the last one short, and one that no coder can make smaller.
DATA = text(2 * SIZE) + noise(SIZE) + text(400)
CODER = StandInCoder()


def pack(data, coder=CODER, block_size=SIZE, **options):
    packed = io.BytesIO()
    sizes = packed_file.pack(coder, io.BytesIO(data), packed, block_size, **options)
    assert sizes == (len(data), len(packed.getvalue()))
    return packed.getvalue()


def unpack(packed, coder=CODER, recover=False, **options):
    """What comes back, and what is damaged."""
    data = io.BytesIO()
    reader = Reader(io.BytesIO(packed), **options)
    reader.check(coder)
    sizes, damage = reader.unpack(coder, data, recover)
    assert sizes.original == len(data.getvalue())
    return data.getvalue(), damage


def survey(packed):
    return Reader(io.BytesIO(packed)).survey()


def blocks_of(packed):
    """Where each block begins in a file, and the end record."""
    places, at = [], HEADER_SIZE
    while packed[at : at + 4] == packed_file.BLOCK_MARKER:
        places.append(at)
        at += BLOCK_HEADER_SIZE + struct.unpack_from("<I", packed, at + 12)[0]
    assert packed[at : at + 4] == packed_file.END_MARKER and at + END_SIZE == len(packed)
    return [*places, at]


def sealed(record):
    return record + struct.pack("<I", zlib.crc32(record))


PACKED = pack(DATA)
PLACES = blocks_of(PACKED)
RANGES = ["0 to 999", "1,000 to 1,999", "2,000 to 2,999", "3,000 to 3,399"]


def without(*numbers):
    """The data without some blocks."""
    parts = [DATA[i : i + SIZE] for i in range(0, len(DATA), SIZE)]
    return b"".join(part for i, part in enumerate(parts, 1) if i not in numbers)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("streams", [None, 1, 7, 1024])
def test_data_come_back(size, streams):
    for data in (text(size), bytes(size), noise(size)):
        packed = pack(data, block_size=64, streams=streams)
        assert unpack(packed) == (data, [])
        assert survey(packed) == (size, [])
        blocks = -(-size // 64)
        assert len(packed) <= HEADER_SIZE + END_SIZE + size + blocks * BLOCK_HEADER_SIZE


def test_layout_is_the_one_that_is_documented():
    """Field by field, as in examples/compression/README.md."""
    packed = pack(text(1500), StandInCoder(build=b"buildnum"), streams=3)
    fields = struct.unpack_from("<4sBBH8s8sIHII", packed)
    tag = zlib.crc32(text(1500)[:1000])
    assert fields[:-1] == (b"SHAC", 2, 2, 0, b"stand-in", b"buildnum", 1000, 3, tag)
    assert fields[-1] == zlib.crc32(packed[:34])
    at, blocks = 38, []
    for number, size in ((1, 1000), (2, 500)):
        block = struct.unpack_from("<4sIIIHIII", packed, at)
        payload = packed[at + 30 : at + 30 + block[3]]
        original = text(1500)[1000 * number - 1000 :][:size]
        assert block[:3] == (b"SHAB", number, size) and block[4] == 3
        assert block[5:7] == (zlib.crc32(original), zlib.crc32(payload))
        assert block[7] == zlib.crc32(packed[at : at + 26], tag)
        at += 30 + len(payload)
        blocks.append(payload)
    end = struct.unpack_from("<4sIQII", packed, at)
    assert end[:4] == (b"SHAE", 2, 1500, zlib.crc32(text(1500)))
    assert end[4] == zlib.crc32(packed[at : at + 20], tag) and at + 24 == len(packed)
    assert pack(text(9))[5] == 1  # a portable model
    stored = pack(b"a")
    assert struct.unpack_from("<H", stored, 38 + 16) == (0,) and stored[68:69] == b"a"


def test_blocks_are_independent():
    whole, second = pack(DATA), pack(DATA[SIZE : 2 * SIZE])
    start, end = PLACES[1] + BLOCK_HEADER_SIZE, PLACES[2]
    assert whole[start:end] == second[HEADER_SIZE + BLOCK_HEADER_SIZE : -END_SIZE]


def test_default_streams():
    class Counting(StandInCoder):
        def encode(self, data, streams, progress=None):
            seen.append((len(data), streams))
            return super().encode(data, streams, progress)

    seen = []
    pack(bytes((4 << 20) + 70_000), Counting(), block_size=packed_file.BLOCK_SIZE)
    assert seen == [(4 << 20, 64), (70_000, 3)]
    assert packed_file.stream_sizes(10, 4) == [3, 3, 3, 1]
    assert packed_file.stream_sizes(5, 4) == [2, 2, 1, 0]


def test_progress_counts_all_bytes():
    done = []
    packed = pack(DATA, progress=done.append)
    assert sum(done) == len(DATA)
    done.clear()
    Reader(io.BytesIO(packed)).unpack(CODER, io.BytesIO(), progress=done.append)
    assert sum(done) == len(DATA)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 63}, "--block-size 63: must be from 64 to 1073741824"),
        ({"block_size": (1 << 30) + 1}, "--block-size"),
        ({"streams": 0}, "--streams 0: must be from 1 to 1024"),
        ({"streams": 1025}, "--streams 1025"),
    ],
)
def test_impossible_numbers(options, message):
    with pytest.raises(UserError, match=message):
        pack(b"abc", **options)


# Damage


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("place", ["marker", "number", "size", "packed size", "sum", "content"])
def test_damage_costs_one_block_and_names_it(number, place):
    at = {"marker": 1, "number": 5, "size": 9, "packed size": 13, "sum": 20, "content": 60}[place]
    damaged = bytearray(PACKED)
    damaged[PLACES[number - 1] + at] ^= 0x41
    damaged = bytes(damaged)
    expected = f"block {number} (bytes {RANGES[number - 1]}) damaged"
    assert unpack(damaged, recover=True) == (without(number), [expected])
    assert survey(damaged) == (len(DATA), [expected])
    with pytest.raises(UserError, match=re.escape(expected)):
        unpack(damaged)


def test_damage_to_several_blocks():
    damaged = bytearray(PACKED)
    for at in (PLACES[0] + 2, PLACES[1] + 2, PLACES[3] + 50):
        damaged[at] ^= 1
    data, damage = unpack(bytes(damaged), recover=True)
    assert data == without(1, 2, 4)
    assert damage == [
        "blocks 1 to 2 (bytes 0 to 1,999) damaged",
        "block 4 (bytes 3,000 to 3,399) damaged",
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_bytes_that_are_missing_or_too_many_cost_one_block(number, count):
    inside = PLACES[number - 1] + BLOCK_HEADER_SIZE + 20
    expected = without(number), [f"block {number} (bytes {RANGES[number - 1]}) damaged"]
    for damaged in (
        PACKED[:inside] + PACKED[inside + count :],
        PACKED[:inside] + b"S" * count + PACKED[inside:],
    ):
        assert unpack(damaged, recover=True) == expected


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_blocks_that_are_missing_or_repeated(number):
    start, end = PLACES[number - 1], PLACES[number]
    expected = [f"block {number} (bytes {RANGES[number - 1]}) damaged"]
    assert unpack(PACKED[:start] + PACKED[end:], recover=True) == (without(number), expected)
    place = "the end" if number == 4 else f"block {number + 1}"
    expected = [f"there are bytes before {place} that are not part of it"]
    repeated = PACKED[:end] + PACKED[start:end] + PACKED[end:]
    assert unpack(repeated, recover=True) == (DATA, expected)
    with pytest.raises(UserError, match="there are bytes before"):
        unpack(repeated)


def test_truncation_is_noticed_wherever_it_is():
    for size in range(len(PACKED)):
        cut = PACKED[:size]
        if size < HEADER_SIZE:
            with pytest.raises(UserError, match="not a file that|header is damaged or cut off"):
                unpack(cut)
            continue
        whole = sum(place <= size for place in PLACES[1:])
        expected = f"cut off in block {whole + 1}: bytes from {whole * SIZE:,} on are missing"
        if whole == 4:
            expected = "cut off after the last block: the checksum of the whole is missing"
        assert survey(cut) == (None, [expected])
        assert unpack(cut, recover=True) == (DATA[: whole * SIZE], [expected])
        with pytest.raises(UserError, match=re.escape(expected)):
            unpack(cut)


def test_bytes_after_the_end():
    assert unpack(PACKED + b"x", recover=True) == (DATA, ["there are bytes after the end"])
    with pytest.raises(UserError, match="there are bytes after the end"):
        unpack(PACKED + PACKED)


def test_block_of_another_file():
    other = pack(DATA[::-1])
    places = blocks_of(other)
    mixed = PACKED[: PLACES[1]] + other[places[1] : places[2]] + PACKED[PLACES[2] :]
    assert unpack(mixed, recover=True) == (without(2), ["block 2 (bytes 1,000 to 1,999) damaged"])


def test_block_of_another_file_with_the_same_first_block():
    """All sums are right but that of the whole."""
    other = pack(DATA[:SIZE] + DATA[SIZE:][::-1])
    places = blocks_of(other)
    mixed = PACKED[: PLACES[1]] + other[places[1] : places[2]] + PACKED[PLACES[2] :]
    with pytest.raises(UserError, match="the blocks are not those of one file"):
        unpack(mixed)


@pytest.mark.parametrize("place", [2, 60])
@pytest.mark.parametrize("blocks", [1, 2])
def test_packed_file_in_a_packed_file(place, blocks):
    """A block that is stored holds records that look like its own file's."""
    size = -(-len(PACKED) // blocks)
    inner = PACKED + noise(size)
    outer = pack(inner, StoringCoder(), block_size=size)
    assert unpack(outer, StoringCoder()) == (inner, [])
    for number, at in enumerate(blocks_of(outer)[:-1]):
        damaged = bytearray(outer)
        damaged[at + place] ^= 1
        del damaged[at + 61]  # so that the next block is searched
        data, damage = unpack(bytes(damaged), StoringCoder(), recover=True)
        assert data == inner[: number * size] + inner[(number + 1) * size :]
        assert len(damage) == 1


def test_content_that_decodes_to_something_else():
    class Wrong(StandInCoder):
        def decode(self, payload, size, streams, progress=None):
            data = super().decode(payload, size, streams, progress)
            return data[:-1] + b"!" if data.startswith(DATA[SIZE : SIZE + 9]) else data

    for build, message in ((bytes(8), "does not have its checksum"), (b"b" * 8, "last digits")):
        data, damage = unpack(pack(DATA, Wrong(build)), Wrong(build), recover=True)
        assert data == without(2) and len(damage) == 1
        assert damage[0].startswith("block 2 (bytes 1,000 to 1,999): ") and message in damage[0]


def test_header():
    other = StandInCoder(identity=b"another1")
    for coder in (other, StandInCoder(build=b"b" * 8, identity=b"another1")):
        with pytest.raises(UserError, match="another model, a portable one; name the file that"):
            unpack(PACKED, coder)
        with pytest.raises(UserError, match="another model; name its checkpoint"):
            unpack(pack(DATA, StandInCoder(build=b"b" * 8)), coder)
    reader = Reader(io.BytesIO(pack(b"", StandInCoder(build=b"buildnum"))))
    assert not reader.is_of_other_build(StandInCoder(build=b"buildnum"))
    assert reader.is_of_other_build(StandInCoder(build=b"buildno2"))
    with pytest.raises(UserError, match="version 1 of the format, which is no longer read"):
        Reader(io.BytesIO(b"SHAC\x01" + bytes(50)))
    with pytest.raises(UserError, match="version 9 of the format; update fairseq-sha"):
        Reader(io.BytesIO(b"SHAC\x09" + bytes(50)))
    for content in (b"", b"SHA", b"\x1f\x8b\x08\x00", bytes(99)):
        with pytest.raises(UserError, match="not a file that fairseq-sha compress wrote"):
            Reader(io.BytesIO(content))
    for at in range(HEADER_SIZE):
        damaged = bytearray(PACKED)
        damaged[at] ^= 0x20
        with pytest.raises(UserError, match="not a file|damaged or cut off|version"):
            Reader(io.BytesIO(bytes(damaged)))


# What someone made in order to do harm: its checksums are right.


def header(kind=1, flags=0, block_size=1000, streams=4):
    fields = (b"SHAC", 2, kind, flags, CODER.identity, bytes(8), block_size, streams, 0)
    return sealed(HEADER.pack(*fields))


def block(number, size, payload, packed_size=None, streams=1, checksum=0):
    packed_size = len(payload) if packed_size is None else packed_size
    fields = (b"SHAB", number, size, packed_size, streams, checksum, zlib.crc32(payload))
    return sealed(BLOCK.pack(*fields)) + payload


def end(blocks, size, checksum=0):
    return sealed(END.pack(b"SHAE", blocks, size, checksum))


@pytest.mark.parametrize(
    "change",
    [{"kind": 0}, {"kind": 3}, {"flags": 1}, {"block_size": 0}, {"block_size": 1 << 31}]
    + [{"streams": 0}, {"streams": 1025}],
    ids=str,
)
def test_header_with_values_that_are_unknown(change):
    with pytest.raises(UserError, match="values that this version does not know"):
        Reader(io.BytesIO(header(**change)))


def test_memory_limit():
    promised = header(block_size=1 << 30)
    with pytest.raises(UserError, match=r"--memory-limit 4294967296$"):
        Reader(io.BytesIO(promised))
    Reader(io.BytesIO(promised), memory_limit=4 << 30)
    Reader(io.BytesIO(header(block_size=1 << 28)))
    with pytest.raises(UserError, match="more than the limit of 3,999; allow it with"):
        Reader(io.BytesIO(PACKED), memory_limit=3999)


@pytest.mark.parametrize(
    "blocks, expected",
    [
        # sizes beyond those of the header, or beyond the file
        ([block(1, 1001, b"x")], "cut off in block 1"),
        ([block(1, 1000, b"x", packed_size=1001)], "cut off in block 1"),
        ([block(1, 0, b"")], "cut off in block 1"),
        ([block(1, 1000, b"x", packed_size=900), end(1, 1000)], "block 1 (bytes 0 to 999) damaged"),
        ([block(1, 9, b"x", streams=5)], "cut off in block 1"),
        ([block(1, 9, b"x", streams=0)], "cut off in block 1"),
        # numbers
        ([block(0, 9, b"x")], "cut off in block 1"),
        ([block(2**32 - 1, 9, b"x")], "blocks 1 to 4,294,967,294 (bytes 0 to 4,294,967,293,999)"),
        ([end(2**32 - 1, 2**63)], "cut off in block 1"),
        ([end(2**32 - 1, (2**32 - 1) * 1000)], "blocks 1 to 4,294,967,295 (bytes 0 to"),
        ([end(1, 1001)], "cut off in block 1"),
        ([end(0, 0, checksum=1)], "the blocks are not those of one file"),
        # blocks that are too short
        ([block(1, 2, b"ab", streams=0, checksum=zlib.crc32(b"ab")), end(1, 999)], "not those"),
        # content that no coder wrote
        ([block(1, 900, b"no zlib"), end(1, 900)], "block 1 (bytes 0 to 899): "),
        ([block(1, 5, zlib.compress(b"a" * 6)[:4]), end(1, 5)], "block 1 (bytes 0 to 4): "),
    ],
)
def test_records_that_no_packer_wrote(blocks, expected):
    packed = b"".join([header(), *blocks])
    data, damage = unpack(packed, recover=True)
    assert damage and expected in damage[0] and len(data) < 3
    with pytest.raises(UserError):
        unpack(packed)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_damage(given_data):
    """Nothing wrong is ever taken for what was packed."""
    damaged = bytearray(PACKED)
    for _ in range(given_data.draw(st.integers(1, 3))):
        at = given_data.draw(st.integers(0, len(damaged) - 1))
        change = given_data.draw(st.sampled_from(["flip", "remove", "insert", "copy"]))
        count = given_data.draw(st.integers(1, 300))
        if change == "flip":
            damaged[at] ^= 1 + count % 255
        elif change == "remove":
            del damaged[at : at + count]
        elif change == "insert":
            damaged[at:at] = given_data.draw(st.binary(min_size=1, max_size=count))
        else:
            damaged[at:at] = damaged[at // 2 : at // 2 + count]
        if not damaged:
            break
    damaged = bytes(damaged)
    try:
        assert unpack(damaged)[0] == DATA
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert damaged == PACKED
    try:
        data, damage = unpack(damaged, recover=True)
    except UserError:
        return  # no header
    parts = [DATA[i : i + SIZE] for i in range(0, len(DATA), SIZE)]
    for part in parts:
        if data.startswith(part):
            data = data[len(part) :]
    assert not data
    assert bool(damage) == (damaged != PACKED)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes(content):
    for packed in (content, MAGIC_AND_VERSION + content, header() + content):
        with pytest.raises(UserError):
            unpack(packed)


MAGIC_AND_VERSION = b"SHAC\x02"


class CountingFile(io.BytesIO):
    """A file that knows how much was read of it."""

    total = 0

    def read(self, count=-1):
        data = super().read(count)
        self.total += len(data)
        return data


@pytest.mark.parametrize("step", [1, 40, 400])
def test_reading_takes_time_in_proportion_to_the_file(step, monkeypatch):
    """Blocks inside blocks inside blocks must not be read again and again."""
    summed = []
    crc32 = zlib.crc32
    monkeypatch.setattr(
        packed_file.zlib, "crc32", lambda d, s=0: summed.append(len(d)) or crc32(d, s)
    )
    size = 60_000
    nested = bytearray(header(block_size=size))
    for number in range(1, size // (BLOCK_HEADER_SIZE + step)):
        fields = (b"SHAB", number, size, size // (1 + number % 2 * size), 1, 0, 0)
        nested += sealed(BLOCK.pack(*fields)) + bytes(step)
    file = CountingFile(nested)
    Reader(file).unpack(CODER, io.BytesIO(), recover=True)
    assert file.total == len(nested)
    assert sum(summed) < 10 * len(nested)


def test_memory_is_not_reserved_for_bytes_that_are_not_there():
    """A file of some bytes that promises half a gigabyte, and a stream without an end."""
    code = (
        "import resource, sys, io\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))\n"
        "from fairseq_sha.packed_file import Reader\n"
        "file = sys.stdin.buffer\n"
        "print(Reader(file, 2 << 30).survey())\n"
    )
    promising = header(block_size=1 << 29) + block(1, 1 << 29, b"x", packed_size=1 << 28)
    for content in (promising, promising[:-1] + bytes(1 << 26), header() + b"SHAB" * (1 << 18)):
        done = subprocess.run(
            [sys.executable, "-c", code], input=content, capture_output=True, cwd=str(REPOSITORY)
        )
        assert b"(None, ['cut off in block 1: " in done.stdout, done.stderr


def test_markers_everywhere_do_not_take_forever():
    """One marker many times, and never the other: each must not be searched to the end."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "from fairseq_sha.packed_file import Reader\n"
        "print(Reader(sys.stdin.buffer).survey())\n"
    )
    content = packed_file.BLOCK_MARKER * (1 << 18)
    damaged = block(1, len(content), b"", packed_size=len(content)) + content
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=header(block_size=len(content)) + damaged,
        capture_output=True,
        cwd=str(REPOSITORY),
    )
    assert b"(None, ['cut off in block 1: " in done.stdout, done.stderr
