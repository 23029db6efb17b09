"""Packed files: what ``fairseq-sha compress`` writes, whatever packs the blocks.

A file is a header, blocks that do not depend on each other, and an end. All of them have checksums,
and blocks are numbered, so that damage loses a block and is named. Files are read and written one
block at a time. ``examples/compression/README.md`` specifies the format.
"""

import re
import struct
import zlib
from typing import NamedTuple, Protocol

from fairseq_sha.errors import UserError

MAGIC = b"SHAC"
VERSION = 2
BLOCK_MARKER, END_MARKER = b"SHAB", b"SHAE"
MARKERS = re.compile(BLOCK_MARKER + b"|" + END_MARKER)
#: Kinds of models: one that computes the same everywhere, and one that its build computes.
PORTABLE, BOUND = 1, 2

# Each of these is followed by its CRC-32, which begins with the file's tag in blocks and ends. So
# those of another file, which may itself be what is packed, are not taken for this one's. The
# fields are those of Header, Block and End.
HEADER = struct.Struct("<4sBBH8s8sIHI")
BLOCK = struct.Struct("<4sIIIHII")
END = struct.Struct("<4sIQI")
CHECKSUM = struct.Struct("<I")

# More streams make a model faster on a CPU. But a stream begins without knowing the text before it:
# with SHA-RNN on enwiki6, streams of 30 KB took 0.1 % more than one stream.
STREAMS = 64
BLOCK_SIZE = STREAMS << 16
#: Small blocks have fewer streams by default: one for each of so many bytes.
BYTES_PER_STREAM = 1 << 15
MOST_STREAMS = 1024
# Blocks are counted in 32 bits: at the least size, as far as 256 GB.
LEAST_BLOCK_SIZE, MOST_BLOCK_SIZE = 1 << 6, 1 << 30
MOST_THREADS = 1024

#: What unpacking may use for blocks, in bytes, and what it needs for each byte of a block: its
#: packed form, its streams, and the whole.
MEMORY_LIMIT = 1 << 30
MEMORY_PER_BYTE = 4
CHUNK = 1 << 20


class BlockCoder(Protocol):
    """What packs blocks: a model of some kind. Every block begins with a fresh state and is cut
    into ``streams`` contiguous parts of ``ceil(size / streams)`` bytes, the last ones shorter."""

    #: 8 bytes that differ between models.
    identity: bytes
    #: 8 bytes that differ between builds, zeros for a model that computes the same everywhere.
    build: bytes

    def encode(self, data, streams, progress=None):
        """Pack a block of at least ``streams`` bytes; ``progress`` gets numbers of further bytes
        done."""

    def decode(self, payload, size, streams, progress=None):
        """The ``size`` bytes that :meth:`encode` packed.

        Raises:
            ValueError: it cannot have packed them; other wrong bytes may be returned instead
        """


class Header(NamedTuple):
    """How a file was packed."""

    magic: bytes
    version: int
    kind: int
    flags: int
    identity: bytes
    build: bytes
    block_size: int
    streams: int  # the most that a block has
    tag: int  # CRC-32 of the original bytes of the first block, 0 if there is none


class Block(NamedTuple):
    """What stands before the packed bytes of a block."""

    marker: bytes
    number: int  # from 1
    size: int
    packed_size: int
    streams: int  # 0: the bytes are stored as they are
    checksum: int
    packed_checksum: int


class End(NamedTuple):
    """What stands after the last block."""

    marker: bytes
    blocks: int
    size: int
    checksum: int


class Sizes(NamedTuple):
    """Bytes of a file before and after."""

    original: int
    packed: int


def pack(coder, source, target, block_size=BLOCK_SIZE, streams=None, progress=None):
    """Pack a stream of bytes.

    Args:
        coder (BlockCoder): what packs blocks
        source, target: binary files, which need not be seekable
        block_size (int): bytes of each block but the last
        streams (int): parts of a block that are coded side by side; by default one for each 32 KiB,
            at most 64
        progress (callable): gets numbers of further bytes done

    Returns:
        :class:`Sizes`

    Raises:
        UserError: impossible numbers
    """
    check_numbers(block_size, streams)
    kind = BOUND if any(coder.build) else PORTABLE
    data = _read(source, block_size)
    tag = zlib.crc32(data)
    header = Header(
        MAGIC, VERSION, kind, 0, coder.identity, coder.build, block_size, streams or STREAMS, tag
    )
    packed = target.write(_sealed(HEADER, header))
    number = size = checksum = 0
    while data:
        number += 1
        used = min(streams or _default_streams(len(data)), len(data))
        payload = coder.encode(data, used, progress)
        if len(payload) >= len(data):
            payload, used = data, 0
        sums = zlib.crc32(data), zlib.crc32(payload)
        block = Block(BLOCK_MARKER, number, len(data), len(payload), used, *sums)
        packed += target.write(_sealed(BLOCK, block, tag))
        packed += target.write(payload)
        size += len(data)
        checksum = zlib.crc32(data, checksum)
        data = _read(source, block_size)
    packed += target.write(_sealed(END, End(END_MARKER, number, size, checksum), tag))
    return Sizes(size, packed)


def check_numbers(block_size=BLOCK_SIZE, streams=None, threads=1):
    """Raise a UserError for a number that is impossible; None is the default number of streams."""
    for option, value, least, most in (
        ("block-size", block_size, LEAST_BLOCK_SIZE, MOST_BLOCK_SIZE),
        ("streams", streams, 1, MOST_STREAMS),
        ("threads", threads, 1, MOST_THREADS),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most}")


def _default_streams(size):
    return min(STREAMS, -(-size // BYTES_PER_STREAM))


def stream_length(size, streams):
    """Bytes of each stream of a block but the last ones, which may be shorter or empty."""
    return -(-size // streams)


def stream_sizes(size, streams):
    """Bytes of each stream of a block: a list."""
    length = stream_length(size, streams)
    return [min(length, max(0, size - i * length)) for i in range(streams)]


class Reader:
    """A packed file that is being read from its beginning.

    Args:
        source: a binary file, which need not be seekable
        memory_limit (int): bytes that its blocks may need

    Raises:
        UserError: something else than a packed file, another version of the format, a damaged
            header, or blocks that need more memory
    """

    def __init__(self, source, memory_limit=MEMORY_LIMIT):
        self._window = _Window(source)
        self.header = _read_header(self._window)
        needed = MEMORY_PER_BYTE * self.header.block_size
        if needed > memory_limit:
            raise UserError(
                f"blocks of {self.header.block_size:,} bytes may need {needed:,} bytes of memory, "
                f"more than the limit of {memory_limit:,}; allow it with --memory-limit {needed}"
            )

    def check(self, coder):
        """Raise a UserError unless a :class:`BlockCoder` has the model that packed the file."""
        if self.header.identity == coder.identity:
            return
        if self.header.kind == PORTABLE:
            raise UserError(
                "was compressed with another model, a portable one; name the file that "
                "fairseq-sha quantize wrote"
            )
        raise UserError("was compressed with another model; name its checkpoint")

    def is_of_other_build(self, coder):
        """Whether another build than that of a :class:`BlockCoder` packed the file, so that it may
        not be possible to unpack it here."""
        return self.header.build != coder.build

    def survey(self):
        """Read the file to its end without unpacking it.

        Returns:
            the bytes of the original, None if the end is missing; and what is damaged: list of str
        """
        damage = []
        for _ in self._blocks(damage.append):
            pass
        return self._end.size if self._end else None, damage

    def unpack(self, coder, target, recover=False, progress=None):
        """Unpack the file.

        Args:
            coder (BlockCoder): see :meth:`check`
            target: binary file
            recover (bool): leave out what is damaged
            progress (callable): gets numbers of further bytes done

        Returns:
            :class:`Sizes`, and what was left out: list of str

        Raises:
            UserError: something is damaged, without ``recover``. Blocks before it were written
        """
        damage = []
        report = damage.append if recover else _refuse
        size = checksum = 0
        for block, payload in self._blocks(report):
            try:
                data = self._unpack_block(coder, block, payload, progress)
            except ValueError as error:
                end = self._start(block.number) + block.size
                report(f"{self._name(block.number, block.number, end)}: {error}")
                continue
            target.write(data)
            size += len(data)
            checksum = zlib.crc32(data, checksum)
            del data, payload  # before the next block is in memory
        if not damage and (size, checksum) != (self._end.size, self._end.checksum):
            report("the blocks are not those of one file")
        return Sizes(size, self._window.position), damage

    def _unpack_block(self, coder, block, payload, progress):
        """The bytes of a block.

        Raises:
            ValueError: they are others than were packed
        """
        if not block.streams:
            if progress:
                progress(len(payload))
            return payload
        data = coder.decode(payload, block.size, block.streams, progress)
        if len(data) != block.size or zlib.crc32(data) != block.checksum:
            raise ValueError(
                "the model computes other last digits here; use the machine and installation that "
                "compressed it, and the same choice of --cpu"
                if self.header.kind == BOUND
                else "its content does not have its checksum; compress the original again"
            )
        return data

    def _blocks(self, report):
        """Yield each intact :class:`Block` and its packed bytes. At the end, ``_end`` is the
        :class:`End`, or None if it is missing.

        Damage is reported once the next intact block or the end shows how far it goes.

        Args:
            report (callable): gets a line about each damage
        """
        window, self._end = self._window, None
        lost = 1  # the first block that was not read yet, or was lost
        least = 1  # numbers that the next block may have
        damaged = complete = False
        searched = 0  # where the bytes end that were searched for a block inside another
        while True:
            record, skipped = self._next_record(least)
            damaged = damaged or skipped > 0
            if record is None:
                start = self._start(lost)
                if complete:
                    report("cut off after the last block: the checksum of the whole is missing")
                else:
                    report(f"cut off in block {lost:,}: bytes from {start:,} on are missing")
                return
            number = record.blocks + 1 if isinstance(record, End) else record.number
            if number > lost:
                end = record.size if isinstance(record, End) else None
                report(f"{self._name(lost, number - 1, end)} damaged")
            elif damaged:
                place = "the end" if isinstance(record, End) else f"block {number:,}"
                report(f"there are bytes before {place} that are not part of it")
            if isinstance(record, End):
                self._end = record
                if window.peek(1):
                    report("there are bytes after the end")
                return
            lost, least, damaged, complete = number, number + 1, False, False
            payload = window.take(record.packed_size)
            if zlib.crc32(payload) == record.packed_checksum and (
                len(payload) == record.packed_size
            ):
                yield record, payload
                del payload
                lost = number + 1
                complete = record.size < self.header.block_size  # only the last block is shorter
                continue
            damaged = True
            # If bytes are missing, the next block begins too early. No byte is searched twice, or
            # a file could be made that takes forever to read.
            end = window.position
            if end - len(payload) >= searched and not self._record(least):
                window.put_back(payload)
                searched = end

    def _next_record(self, least):
        """Find the next record.

        Args:
            least (int): the least number of the next block

        Returns:
            a :class:`Block` or the :class:`End`, which has been taken, None if there is none; and
            the number of bytes that were skipped before it
        """
        skipped = 0
        while True:
            record = self._record(least)
            if record is not None:
                self._window.take((END if isinstance(record, End) else BLOCK).size + CHECKSUM.size)
                return record, skipped
            passed = self._window.skip_to_marker()
            skipped += passed
            if not passed:
                return None, skipped

    def _record(self, least):
        """The :class:`Block` or :class:`End` that begins here; None if there is none."""
        start = self._window.peek(BLOCK.size + CHECKSUM.size)
        limit = self.header.block_size
        if start.startswith(BLOCK_MARKER):
            fields = _unsealed(BLOCK, start, self.header.tag)
            block = fields and Block(*fields)
            if (
                block
                and block.number >= least
                and 0 < block.size <= limit
                and block.packed_size <= block.size
                and block.streams <= self.header.streams
                and (block.streams or block.packed_size == block.size)
            ):
                return block
        elif start.startswith(END_MARKER):
            fields = _unsealed(END, start, self.header.tag)
            end = fields and End(*fields)
            if end and end.blocks >= least - 1 and end.blocks == -(-end.size // limit):
                return end
        return None

    def _start(self, number):
        return (number - 1) * self.header.block_size

    def _name(self, first, last, end=None):
        """Blocks and the bytes of the original that they hold.

        Args:
            first, last (int): numbers of blocks
            end (int): the size of the original, if it is known
        """
        stop = self._start(last + 1) if end is None else min(end, self._start(last + 1))
        blocks = f"block {first:,}" if first == last else f"blocks {first:,} to {last:,}"
        return f"{blocks} (bytes {self._start(first):,} to {stop - 1:,})"


class _Window:
    """A stream of which some bytes ahead can be seen. It never holds more than was asked for and
    ``CHUNK`` bytes, and never reserves memory for bytes that the stream does not have."""

    def __init__(self, source):
        self._source = source
        self._buffer = bytearray()
        self.position = 0

    def _fill(self, count):
        """Have ``count`` bytes, or all that are left."""
        while len(self._buffer) < count:
            more = self._source.read(min(CHUNK, count - len(self._buffer)))
            if not more:
                break
            self._buffer += more

    def peek(self, count):
        """The next bytes, fewer at the end of the stream."""
        self._fill(count)
        with memoryview(self._buffer) as buffer:
            return bytes(buffer[:count])

    def take(self, count):
        """The same, and move on."""
        taken = self.peek(count)
        self._drop(len(taken))
        return taken

    def _drop(self, count):
        del self._buffer[:count]
        self.position += count

    def put_back(self, data):
        """Undo :meth:`take`."""
        self._buffer[:0] = data
        self.position -= len(data)

    def skip_to_marker(self):
        """Move on, by one byte at least, to the next marker or to the end of the stream; returns
        the number of bytes passed."""
        before, kept = self.position, len(BLOCK_MARKER) - 1
        start = 1
        while True:
            # Both markers in one search: otherwise each step could look for the one that is far
            # away in all of the buffer.
            found = MARKERS.search(self._buffer, start)
            if found:
                self._drop(found.start())
                break
            # A marker may have begun in the last bytes.
            self._drop(max(start, len(self._buffer) - kept) if self._buffer else 0)
            rest = len(self._buffer)
            self._fill(rest + CHUNK)
            if len(self._buffer) == rest:
                self._drop(rest)
                break
            start = 0
        return self.position - before


def _read_header(window):
    start = window.peek(len(MAGIC) + 1)
    if not start.startswith(MAGIC):
        raise UserError("not a file that fairseq-sha compress wrote")
    version = start[-1] if len(start) > len(MAGIC) else VERSION
    if version == 1:
        raise UserError(
            "has version 1 of the format, which is no longer read; use the fairseq-sha that wrote "
            "it, or compress the original again"
        )
    fields = _unsealed(HEADER, window.take(HEADER.size + CHECKSUM.size))
    if fields is None and version == VERSION:
        raise UserError("its header is damaged or cut off; copy it again")
    if version != VERSION:
        raise UserError(f"has version {version} of the format; update fairseq-sha")
    header = Header(*fields)
    if (
        header.kind not in (PORTABLE, BOUND)
        or header.flags
        or not LEAST_BLOCK_SIZE <= header.block_size <= MOST_BLOCK_SIZE
        or not 0 < header.streams <= MOST_STREAMS
    ):
        raise UserError("its header has values that this version does not know; update fairseq-sha")
    return header


def _sealed(layout, fields, tag=0):
    """A record and its checksum."""
    record = layout.pack(*fields)
    return record + CHECKSUM.pack(zlib.crc32(record, tag))


def _unsealed(layout, data, tag=0):
    """The fields of a record at the beginning of some bytes; None if its checksum is wrong."""
    end = layout.size + CHECKSUM.size
    record = data[: layout.size]
    if len(data) < end or CHECKSUM.pack(zlib.crc32(record, tag)) != data[layout.size : end]:
        return None
    return layout.unpack(record)


def _read(source, count):
    """``count`` bytes, fewer only at the end, from files that may return fewer at once."""
    data = bytearray()
    while len(data) < count:
        more = source.read(count - len(data))
        if not more:
            break
        data += more
    return bytes(data)


def _refuse(damage):
    raise UserError(damage)
