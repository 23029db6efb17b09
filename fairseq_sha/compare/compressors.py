"""Classical compressors as rivals of models, in bits per byte of a test text.

A compressor is measured *alone*, and *primed* with training text: what the test text adds to the
compressed size of the training text before it, ``size(train + test) - size(train)``. So it has read
what a model has read. Priming helps only as far back as a compressor looks: gzip 32 kB, bzip2
900 kB, brotli 16 MB, xz 64 MB, the others as far as there is memory.

Each is used at its strongest. The orders of PPMd, from 5 to 32, were compared on the valid split of
enwiki6: 16 is the best, or equal to a higher one, of both variants, alone and primed.
"""

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import platform
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import fairseq_sha
from fairseq_sha import packed_file
from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

PROGRESS_SECONDS = 10
INSTALL = "pip install 'fairseq-sha[compare]'"

# PPMd forgets all when its memory is full. On enwiki6, half of this is enough for variant H.
PPMD_ORDER = 16
PPMD_MEMORY_PER_BYTE = 64
PPMD_LEAST_MEMORY, PPMD_MOST_MEMORY = 1 << 24, (1 << 32) - 37
# A block of ZPAQ has 2^(20 + B) - 4096 bytes, and blocks do not know of each other.
ZPAQ_BLOCKS = range(6, 12)


class Compressor(NamedTuple):
    """One compressor with its settings."""

    #: What users type.
    key: str
    #: What tables say, with the settings.
    name: str
    #: Compressed size: bytes to int.
    size: Callable
    #: The package on PyPI, also the name of its module; None for the standard library.
    package: Optional[str] = None

    @property
    def installed(self):
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @property
    def version(self):
        """The package, or Python, with its version."""
        if self.package is None:
            return f"Python {platform.python_version()}"
        return f"{self.package} {metadata.version(self.package)}"


def _brotli(data):
    import brotli

    return len(brotli.compress(data, quality=11, lgwin=24))


def _zstd(data):
    import zstandard

    # The library reduces the window to the size of the data.
    settings = zstandard.ZstdCompressionParameters.from_level(
        22, window_log=zstandard.WINDOWLOG_MAX, enable_ldm=True
    )
    return len(zstandard.ZstdCompressor(compression_params=settings).compress(data))


def _ppmd_h(data):
    import pyppmd

    return _flushed(pyppmd.Ppmd7Encoder(PPMD_ORDER, _ppmd_memory(data)), data)


def _ppmd_i(data):
    import pyppmd

    return _flushed(pyppmd.Ppmd8Encoder(PPMD_ORDER, _ppmd_memory(data)), data)


def _flushed(encoder, data):
    return len(encoder.encode(data)) + len(encoder.flush())


def _ppmd_memory(data):
    enough = max(PPMD_MEMORY_PER_BYTE * len(data), PPMD_LEAST_MEMORY)
    return min(enough, PPMD_MOST_MEMORY)


def _zpaq(data):
    import zpaq

    # The smallest block that holds everything, so that the test text is not cut off from train.
    fits = (b for b in ZPAQ_BLOCKS if len(data) <= (1 << 20 + b) - 4096)
    block = next(fits, ZPAQ_BLOCKS[-1])
    # Several threads would cut the data into blocks.
    return len(zpaq.compress(data, threads=1, method=f"5{block}"))


_ALL = (
    Compressor("gzip", "gzip -9", lambda data: len(gzip.compress(data, 9))),
    Compressor("bzip2", "bzip2 -9", lambda data: len(bz2.compress(data, 9))),
    Compressor(
        "xz", "xz -9e", lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    ),
    Compressor("brotli", "brotli, quality 11, window 24", _brotli, "brotli"),
    Compressor("zstd", "zstd --ultra -22 --long=31", _zstd, "zstandard"),
    Compressor("ppmd-h", f"PPMd variant H, order {PPMD_ORDER}", _ppmd_h, "pyppmd"),
    Compressor("ppmd-i", f"PPMd variant I, order {PPMD_ORDER}", _ppmd_i, "pyppmd"),
    Compressor("zpaq", "ZPAQ, method 5", _zpaq, "zpaq"),
)
#: By the name that users type.
COMPRESSORS = {compressor.key: compressor for compressor in _ALL}


def chosen(only=None):
    """The compressors of these names, all without them: a list.

    Raises:
        UserError: a name is not known
    """
    for key in only or ():
        if key not in COMPRESSORS:
            raise UserError(f"{key}: no such compressor; known are {', '.join(COMPRESSORS)}")
    return [COMPRESSORS[key] for key in dict.fromkeys(only or COMPRESSORS)]


def missing(only=None):
    """A line that says which of the chosen compressors are not installed, and how to install them;
    None if all are there."""
    names = [compressor.name for compressor in chosen(only) if not compressor.installed]
    return f"not installed: {'; '.join(names)}; {INSTALL}" if names else None


def rows(train, test, primed_with=None, cache=None, only=None, streams=1, progress=None):
    """Measure compressors. Those that are not installed are left out, see :func:`missing`.

    Args:
        train (bytes): what to prime with
        test (bytes): what is counted
        primed_with (iterable of int): bytes of train to prime with, see :func:`part_read`; 0 is
            alone; default: 0 and all
        cache (str or Path): a JSON file that remembers sizes by content, compressor and version;
            its seconds are those of the machine where they were measured
        only (iterable of str): names of compressors, keys of :data:`COMPRESSORS`; default: all
        streams (int): see :func:`part_read`
        progress (callable): gets lines of text while something slow is measured

    Returns:
        list of dict: ``name``, ``primed_with``, ``bits`` (per byte of test), ``seconds`` (to
        compress the priming text and test), ``version``

    Raises:
        UserError: test is empty, a number is negative or a name unknown; the cache is damaged
    """
    if not test:
        raise UserError("the text to compress is empty; name another split")
    counts = (0, len(train)) if primed_with is None else primed_with
    parts = [part_read(train, count, streams) for count in counts]
    parts = {len(part): part for part in parts}  # each once
    sizes = Sizes(cache, progress)
    out = []
    for compressor in chosen(only):
        if not compressor.installed:
            continue
        for count, part in sorted(parts.items()):
            before, _ = sizes.of(compressor, part) if part else (0, 0)
            size, seconds = sizes.of(compressor, part + test)
            out.append(
                {
                    "name": compressor.name,
                    "primed_with": count,
                    "bits": 8 * (size - before) / len(test),
                    "seconds": round(seconds, 2),
                    "version": compressor.version,
                }
            )
    return out


def rows_of_model(path, coder, test, primed_with, progress=None):
    """Measure a model as a compressor. Whoever unpacks a text needs the model too, as they need the
    priming text of a compressor. So the size of its file is counted in the row of the compressor
    alone, and it is not counted in the primed row.

    Args:
        path (str or Path): the file of the model
        coder (~fairseq_sha.packed_file.BlockCoder): what packs with it
        test (bytes): what is counted
        primed_with (int): of the primed row; 0 for none
        progress (callable): gets numbers of further bytes done

    Returns:
        list of dict: as from :func:`rows`
    """
    size_of_model = Path(path).stat().st_size
    started = time.perf_counter()
    _, size = packed_file.pack(coder, io.BytesIO(test), io.BytesIO(), progress=progress)
    row = {
        "name": f"{Path(path).name}, a model of {size_of_model:,} bytes",
        "seconds": round(time.perf_counter() - started, 2),
        "version": f"fairseq-sha {fairseq_sha.__version__}",
    }
    sizes = {0: size_of_model + size}
    if primed_with:
        sizes[primed_with] = size
    return [
        {**row, "primed_with": count, "bits": 8 * total / len(test)}
        for count, total in sizes.items()
    ]


def part_read(train, count, streams=1):
    """The first ``count`` bytes that a model reads in training, all of them if there are fewer.

    Training cuts the text into ``streams`` equal runs and reads them side by side. A model that has
    not finished the first epoch has read the beginning of each run, and that is what is returned:
    the beginnings, in the order of the text. One stream gives the beginning of the text. A model
    that begins at a random place (``random_start``) has read as much of other places.

    Raises:
        UserError: ``count`` is negative, or ``streams`` not positive
    """
    if count < 0:
        raise UserError(f"{count} bytes of train to prime with: give 0 or more")
    if streams < 1:
        raise UserError(f"{streams} streams: a model reads at least one")
    if count >= len(train):
        return train
    bounds, ends = _bounds(len(train), streams), _bounds(count, streams)
    lengths = [end - start for start, end in zip(ends, ends[1:])]
    return b"".join(train[start : start + n] for start, n in zip(bounds, lengths))


def _bounds(total, parts):
    """Where equal parts begin and end, the longest first, as
    :func:`fairseq_sha.data.segments.stream_bounds` has it."""
    shortest, longer = divmod(total, parts)
    return [i * shortest + min(i, longer) for i in range(parts + 1)]


class Sizes:
    """Compressed sizes, each measured once.

    Args:
        path (str or Path): a JSON file that keeps them, rewritten after each measurement; None to
            remember them in this object only
        progress (callable): gets lines of text while something slow is measured

    Raises:
        UserError: the file is not one that this class wrote
    """

    def __init__(self, path=None, progress=None):
        self.path = path
        self.progress = progress or (lambda line: None)
        self.known = {} if path is None else _read(path)

    def of(self, compressor, data):
        """The compressed size in bytes, and the seconds that it took to measure."""
        key = f"{hashlib.sha256(data).hexdigest()} {compressor.name} {compressor.version}"
        if key not in self.known:
            self.known[key] = self._measure(compressor, data)
            if self.path is not None:
                lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.known.items())
                write_atomically(self.path, "{\n" + ",\n".join(lines) + "\n}\n")
        return self.known[key]

    def _measure(self, compressor, data):
        done = []

        def work():
            started = time.perf_counter()
            try:
                done.append([compressor.size(data), time.perf_counter() - started])
            except BaseException as error:
                done.append(error)

        # A thread of its own, which does not keep the program alive: so there is progress to show,
        # and Ctrl-C ends the program at once, while a library is busy for minutes.
        thread = threading.Thread(target=work, daemon=True)
        started = time.monotonic()
        thread.start()
        thread.join(PROGRESS_SECONDS)
        while thread.is_alive():
            seconds = time.monotonic() - started
            self.progress(f"{compressor.name}: {len(data):,} bytes, {seconds:.0f} s")
            thread.join(PROGRESS_SECONDS)
        (result,) = done
        if isinstance(result, MemoryError):
            raise UserError(f"{compressor.name}: not enough memory for {len(data):,} bytes")
        if isinstance(result, BaseException):
            raise result
        return result


def _read(path):
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        if all(len(value) == 2 for value in known.values()):
            return known
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path}: not a cache of compressed sizes; remove it or name another file")


def table(results, train_size):
    """The rows as Markdown, one line per compressor, the best first.

    Args:
        results (list of dict): from :func:`rows` and :func:`rows_of_model`
        train_size (int): bytes of all of train
    """

    def title(count):
        if count == 0:
            return "alone"
        return f"after {'all ' if count == train_size else ''}{count:,} bytes of train"

    counts = sorted({row["primed_with"] for row in results})
    by_name = {}
    for row in results:
        by_name.setdefault(row["name"], {})[row["primed_with"]] = row
    cells = ["compressor"]
    cells += [f"bits per byte, {title(count)}" for count in counts]
    cells += [f"seconds, {title(count)}" for count in counts]
    lines = [cells, ["---"] * len(cells)]
    for name, found in sorted(by_name.items(), key=lambda item: item[1][counts[-1]]["bits"]):
        cells = [f"{found[count]['bits']:.3f}" if count in found else "–" for count in counts]
        cells += [f"{found[count]['seconds']:,.1f}" if count in found else "–" for count in counts]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
