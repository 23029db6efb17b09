"""The integer form of a SHA-RNN, and its file.

Everything that is computed from it is integer arithmetic, which gives the same result on every
machine. There are four kinds of numbers:

* A *value* is a fixed-point number with ``fraction`` bits after the point, clamped to
  ``+-MOST_VALUE``: the cells' states, the sums along the layers, what goes into a sigmoid, logits.
* An *activation* is a value that was rounded to 16 bits to be multiplied by a matrix:
  ``round(value / 2^shift)``, clamped so that no sum of a product can leave 32 bits.
* A *weight* is 8 bits; each row of a matrix has a scale of its own. What a row makes of activations
  ``x`` is ``(multiplier * (w . x) + bias) >> shift``, a value, with the sum ``w . x`` in 32 bits
  and the rest in 64.
* A *share* has 15 bits after the point and is at most 1: sigmoids, and what attention weighs by.

``>>`` rounds down, for negative numbers too, as it does in numpy and in LLVM's ``ashr``. All
divisions are of numbers that are not negative.

The file: ``MAGIC``, the length of the header, the header in JSON, the arrays one after another
without gaps, little-endian, in the order of :func:`layout`, and a CRC-32 of all that.
"""

import hashlib
import json
import struct
import zlib
from typing import NamedTuple

import numpy as np

from fairseq_sha.errors import UserError
from fairseq_sha.files import write_atomically

MAGIC = b"SHAI\x01"  # the last byte is the version of the format
LENGTH = struct.Struct("<I")
CHECKSUM = struct.Struct("<I")
LONGEST_HEADER = 1 << 20

CELLS = ("lstm", "sru", "min_gru")
#: Matrices of a cell that read its input.
MAPS = {"lstm": 4, "sru": 3, "min_gru": 2}

MOST_VALUE = (1 << 23) - 1
SHARE_BITS = 15
#: The table of the sigmoid has this many entries for each 1 of its argument, from -8 to 8.
SIGMOID_BITS = 9
SIGMOID_ENTRIES = 16 << SIGMOID_BITS
#: The table of exp(-x), with 24 bits after the point, has this many entries for each 1, up to 16.
EXP_BITS = 8
EXP_ENTRIES = 16 << EXP_BITS
MOST_EXP = (1 << 24) - 1
#: The largest entry of the attention's memory, which has 8 bits: it is most of what a step reads.
MOST_MEMORY = 127
#: The shares of the rows that attention mixes sum up to less than 2 to this power, so that the mix
#: fits 32 bits.
MIX_BITS = 24
#: What turns a score into steps of the table of exp has this many bits after the point.
SCORE_BITS = 32
#: The gate of the mix, a factor on rows of the memory that gives values, has so many bits.
GATE_BITS = 8
#: Normalised numbers, and the weights of norms, have this many bits after the point.
NORM_BITS = 16
#: Frequencies of the 256 bytes sum up to 2 to this power.
TOTAL_BITS = 24

MOST_SIZES = {"width": 4096, "layers": 256, "boom_multiple": 16, "window": 65536}
MOST_MULTIPLIER = 1 << 28
MOST_BIAS = 1 << 61
LONGEST_NGRAM = 32
MOST_NGRAMS = 8
MOST_NGRAM_ROWS = 1 << 24
#: Embeddings are shifted to the left by so many bits before n-grams are added.
EMBEDDING_BITS = 7
#: The most that turns an n-gram's weight of 8 bits into the unit of the shifted embeddings.
MOST_NGRAM_MULTIPLIER = 1 << 16


class Sizes(NamedTuple):
    """What the shapes of all arrays follow from."""

    cell: str
    width: int  # H
    layers: int  # L
    boom_multiple: int  # N
    attention_layers: tuple  # of int, rising; A of them
    window: int  # rows that attention sees, the newest included
    fraction: int  # bits after the point of values
    known: tuple  # of int: the bytes that the model was trained on, rising; S of them
    ngram_orders: tuple = ()  # of int: lengths of n-grams that are embedded; K of them
    ngram_buckets: int = 0  # rows of the table of each length


class Arrays(NamedTuple):
    """The numbers of a model. ``G`` is the number of maps of the cell, 4, 3 or 2; ``R`` is 4 for
    the LSTM, else 0. A cell's ``G`` maps of ``H`` rows follow one another, as in its class in
    :mod:`fairseq_sha.modules.cells`. ``shifts`` are those of activations; see :func:`layout`."""

    sigmoid: np.ndarray  # shares
    exp: np.ndarray
    # A norm follows: each row has its own scale, or, with n-grams, all have one. The last row is
    # for other bytes.
    embedding: np.ndarray
    ngram_tokens: np.ndarray  # what stands for each row of the embedding in hashes
    ngram_weight: np.ndarray  # the tables one after another
    ngram_multiplier: np.ndarray
    start_norm: np.ndarray  # [., 0] weights and [., 1] biases, as for all norms
    cell_shifts: np.ndarray
    cell_weight: np.ndarray
    cell_multiplier: np.ndarray
    cell_bias: np.ndarray
    cell_shift: np.ndarray
    hidden_weight: np.ndarray  # of the LSTM: added to the cell's before bias and shift
    hidden_multiplier: np.ndarray
    state_weight: np.ndarray  # of SRU: v_f and v_r
    memory_norm: np.ndarray
    middle_norm: np.ndarray
    attention_shifts: np.ndarray  # of the query's input, the query and the memory
    query_weight: np.ndarray
    query_multiplier: np.ndarray
    query_bias: np.ndarray
    query_shift: np.ndarray
    query_norm: np.ndarray
    score_multiplier: np.ndarray
    value_gate: np.ndarray
    boom_norm: np.ndarray
    residual_norm: np.ndarray
    boom_shifts: np.ndarray
    boom_weight: np.ndarray
    boom_multiplier: np.ndarray
    boom_bias: np.ndarray
    boom_shift: np.ndarray
    boom_out: np.ndarray  # 1 / 1.702, with NORM_BITS bits
    head_shifts: np.ndarray
    head_weight: np.ndarray
    head_multiplier: np.ndarray
    head_bias: np.ndarray
    head_shift: np.ndarray


def layout(sizes):
    """The type and shape of each array of :class:`Arrays`, a dict in the order of the file."""
    cell, width, layers, boom, attention, _, _, known, orders, buckets = sizes
    maps, heads = MAPS[cell] * width, len(attention)
    lstm, sru = cell == "lstm", cell == "sru"
    i1, i2, i4, i8 = "<i1", "<i2", "<i4", "<i8"

    def linear(name, number, rows):
        return {
            f"{name}_weight": (i1, (number, rows, width)),
            f"{name}_multiplier": (i4, (number, rows)),
            f"{name}_bias": (i8, (number, rows)),
            f"{name}_shift": (i8, (number,)),
        }

    described = {
        "sigmoid": (i2, (SIGMOID_ENTRIES,)),
        "exp": (i4, (EXP_ENTRIES,)),
        "embedding": (i2, (len(known) + 1, width)),
        "ngram_tokens": (i4, (len(known) + 1 if orders else 0,)),
        "ngram_weight": (i1, (len(orders) * buckets, width)),
        "ngram_multiplier": (i4, (len(orders) * buckets,)),
        "start_norm": (i8, (layers, 2, width)),
        "cell_shifts": (i8, (layers, 2)),
        **linear("cell", layers, maps),
        "hidden_weight": (i1, (layers if lstm else 0, maps, width)),
        "hidden_multiplier": (i4, (layers if lstm else 0, maps)),
        "state_weight": (i4, (layers if sru else 0, 2, width)),
        "memory_norm": (i8, (heads, 2, width)),
        "middle_norm": (i8, (heads, 2, width)),
        "attention_shifts": (i8, (heads, 3)),
        **linear("query", heads, width),
        "query_norm": (i8, (heads, 2, width)),
        "score_multiplier": (i8, (heads,)),
        "value_gate": (i4, (heads, width)),
        "boom_norm": (i8, (layers, 2, width)),
        "residual_norm": (i8, (layers, 2, width)),
        "boom_shifts": (i8, (layers, 1)),
        **linear("boom", layers, boom * width),
        "boom_out": (i8, (1,)),
        "head_shifts": (i8, (1, 1)),
        **linear("head", 1, len(known)),
    }
    return {name: described[name] for name in Arrays._fields}


class IntegerModel(NamedTuple):
    """What a file holds."""

    sizes: Sizes
    arrays: Arrays
    identity: bytes  # the first 8 of the SHA-256 of the file


def limits(weights):
    """The largest activation that each matrix may be given, so that no sum leaves 32 bits: the sum
    of a row is at most the sum of its absolute weights times this.

    Args:
        weights (ndarray): int8 ``[number, rows, width]``

    Returns:
        int64 array ``[number]``, at most 32767
    """
    sums = np.abs(weights.astype(np.int64)).sum(2).max(1, initial=1)
    return np.minimum((2**31 - 1) // np.maximum(sums, 1), 32767)


def query_limit(width):
    """The largest entry of a query, so that no score leaves 32 bits."""
    return min((2**31 - 1) // (MOST_MEMORY * width), 32767)


def write(path, sizes, arrays):
    """Write a model's file; returns its :class:`IntegerModel`."""
    content = pack(sizes, arrays)
    model = unpack(content, path)  # only what can be read is written
    write_atomically(path, content)
    return model


def pack(sizes, arrays):
    """A model's file, as bytes."""
    fields = {"family": "sha_rnn", **sizes._asdict()}
    if not sizes.ngram_orders:
        # Files from before there were n-grams have no such fields, and stay what they were.
        del fields["ngram_orders"], fields["ngram_buckets"]
    header = json.dumps(fields, separators=(",", ":")).encode()
    parts = [MAGIC, LENGTH.pack(len(header)), header]
    for name, (kind, shape) in layout(sizes).items():
        array = np.ascontiguousarray(getattr(arrays, name), kind)
        assert array.shape == shape, (name, array.shape, shape)
        parts.append(array.tobytes())
    content = b"".join(parts)
    return content + CHECKSUM.pack(zlib.crc32(content))


def is_portable_file(path):
    """Whether a file begins as one that :func:`write` wrote, of whatever version."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC))[:-1] == MAGIC[:-1]


def read(path):
    """The :class:`IntegerModel` of a file.

    Raises:
        OSError: it cannot be read
        UserError: it was not written by :func:`write`, or is damaged
    """
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise UserError(
                f"{path}: not a file of this version of fairseq-sha quantize; make it again"
            )
        return unpack(start + file.read(), path)


def unpack(content, name):
    """The :class:`IntegerModel` of a file's content; ``name`` is for messages.

    Raises:
        UserError: damaged, or numbers with which sums could overflow
    """
    damaged = UserError(f"{name}: damaged or cut off; copy it again, or run fairseq-sha quantize")
    start = len(MAGIC) + LENGTH.size
    if len(content) < start + CHECKSUM.size:
        raise damaged
    (checksum,) = CHECKSUM.unpack(content[-CHECKSUM.size :])
    if zlib.crc32(content[: -CHECKSUM.size]) != checksum:
        raise damaged
    (length,) = LENGTH.unpack(content[len(MAGIC) : start])
    if length > min(LONGEST_HEADER, len(content)):
        raise damaged
    sizes = _read_header(content[start : start + length], damaged)
    arrays, offset = {}, start + length
    for array, (kind, shape) in layout(sizes).items():
        count = int(np.prod(shape, dtype=object))
        end = offset + count * np.dtype(kind).itemsize
        if end > len(content) - CHECKSUM.size:
            raise damaged
        flat = np.frombuffer(content, kind, count, offset)
        arrays[array] = flat.astype(flat.dtype.newbyteorder("=")).reshape(shape)
        offset = end
    if offset != len(content) - CHECKSUM.size:
        raise damaged
    model = IntegerModel(sizes, Arrays(**arrays), hashlib.sha256(content).digest()[:8])
    _check_bounds(model, damaged)
    return model


def _read_header(text, damaged):
    try:
        header = json.loads(text.decode())
        family = header.pop("family")
        header["attention_layers"] = tuple(header["attention_layers"])
        header["known"] = tuple(header["known"])
        header["ngram_orders"] = orders = tuple(header.get("ngram_orders", ()))
        sizes = Sizes(**header)
        numbers = [getattr(sizes, name) for name in (*MOST_SIZES, "fraction")]
        numbers += [*sizes.attention_layers, *sizes.known, *orders, sizes.ngram_buckets]
        good = family == "sha_rnn" and sizes.cell in CELLS
        good = good and all(type(number) is int for number in numbers)
        good = good and all(0 < getattr(sizes, n) <= most for n, most in MOST_SIZES.items())
        good = good and 10 <= sizes.fraction <= 16
        good = good and len(orders) <= MOST_NGRAMS
        good = good and all(2 <= order <= LONGEST_NGRAM for order in orders)
        good = good and (sizes.ngram_buckets > 0) == bool(orders)
        good = good and 0 <= len(orders) * sizes.ngram_buckets <= MOST_NGRAM_ROWS
        for rising, end in ((sizes.attention_layers, sizes.layers), (sizes.known, 256)):
            good = good and list(rising) == sorted(set(rising))
            good = good and all(0 <= number < end for number in rising)
        if good and sizes.known:
            return sizes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise damaged


def _check_bounds(model, damaged):
    """Raise ``damaged`` unless the arrays are such that nothing can overflow, so that the forms
    need no checks: with these bounds all sums stay below 2^63 and all look-ups in their tables."""
    arrays = model.arrays
    inside = [
        (arrays.sigmoid, 0, (1 << SHARE_BITS) - 1),
        (arrays.exp, 0, MOST_EXP),
        (arrays.exp[:1], MOST_EXP, MOST_EXP),
        (arrays.score_multiplier, 0, MOST_MULTIPLIER),
        (arrays.boom_out, 0, 1 << NORM_BITS),
        (arrays.state_weight, -MOST_MULTIPLIER, MOST_MULTIPLIER),
        (arrays.value_gate, -MOST_MULTIPLIER, MOST_MULTIPLIER),
        (arrays.ngram_tokens, 0, 1 << 16),
        (arrays.ngram_multiplier, 0, MOST_NGRAM_MULTIPLIER),
    ]
    for name, array in zip(arrays._fields, arrays):
        if name.endswith("_norm"):
            inside.append((array[:, 0], -MOST_MULTIPLIER, MOST_MULTIPLIER))
            inside.append((array[:, 1], -MOST_BIAS, MOST_BIAS))
        elif name.endswith("_multiplier") and name not in ("score_multiplier", "ngram_multiplier"):
            inside.append((array, 0, MOST_MULTIPLIER))
        elif name.endswith("_bias"):
            inside.append((array, -MOST_BIAS, MOST_BIAS))
        elif name.endswith("_shift"):
            inside.append((array, 0, 62))
        elif name.endswith("_shifts"):
            inside.append((array, 0, 24))
    for array, least, most in inside:
        if array.size and not least <= int(array.min()) <= int(array.max()) <= most:
            raise damaged
