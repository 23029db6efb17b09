"""The integer model as one compiled loop: reads, predicts and codes without returning to Python.

Each function does what the one of its name in :mod:`fairseq_sha.portable.numpy_form` does, with the
same result in every bit. Arrays of streams have the streams in their last dimension, ``[H, B]``, so
that vector units run along them; ``B`` is 1 or a multiple of ``LANES``. Activations are ``[H / 2,
B, 2]``, filled up with zeros to a multiple of ``PAIRS``.
"""

import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairseq_sha import ngram_hash
from fairseq_sha.ngram_hash import FACTOR, PRIME
from fairseq_sha.packed_file import stream_length
from fairseq_sha.portable import coder
from fairseq_sha.portable.model import (
    CELLS,
    EMBEDDING_BITS,
    EXP_BITS,
    EXP_ENTRIES,
    GATE_BITS,
    MIX_BITS,
    MOST_MEMORY,
    MOST_VALUE,
    NORM_BITS,
    SCORE_BITS,
    SHARE_BITS,
    SIGMOID_BITS,
    SIGMOID_ENTRIES,
    TOTAL_BITS,
    limits,
    query_limit,
)
from fairseq_sha.portable.vector_products import (
    LANES,
    PAIRS,
    TILE,
    mix_rows,
    tile_of_rows,
    tile_of_streams,
)

LSTM, SRU, MIN_GRU = (CELLS.index(name) for name in ("lstm", "sru", "min_gru"))
HALF_SHARE = 1 << (SHARE_BITS - 1)
CODE_BITS, WORD_BITS = coder.CODE_BITS, coder.WORD_BITS
#: What the loop does with the byte that comes next.
ENCODE, DECODE, GENERATE = range(3)
#: Bytes between two calls of ``progress``.
BYTES_PER_CALL = 2048

#: For what only compiled functions call. The wrappers for calls from Python take long to compile.
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Network(NamedTuple):
    """The model, see :class:`~fairseq_sha.portable.model.Arrays`. Matrices are filled up to whole
    tiles. Those of 16 bits hold the same as those of 8 bits and are for many streams."""

    # cell, H, L, window, fraction, floor(sqrt(H) 2^32), limit of queries, buckets of n-grams
    numbers: np.ndarray
    head_of: np.ndarray  # [L]: which attention head a layer has, or -1
    known: np.ndarray  # [S]
    row_of: np.ndarray  # [256]
    sigmoid: np.ndarray
    exp: np.ndarray
    embedding: np.ndarray
    ngram_orders: np.ndarray  # [K]
    ngram_tokens: np.ndarray
    ngram_weight: np.ndarray
    ngram_multiplier: np.ndarray
    start_norm: np.ndarray
    cell_shifts: np.ndarray
    cell_weight: np.ndarray
    cell_wide: np.ndarray
    cell_limit: np.ndarray
    cell_multiplier: np.ndarray
    cell_bias: np.ndarray
    cell_shift: np.ndarray
    hidden_weight: np.ndarray
    hidden_wide: np.ndarray
    hidden_limit: np.ndarray
    hidden_multiplier: np.ndarray
    state_weight: np.ndarray
    memory_norm: np.ndarray
    middle_norm: np.ndarray
    attention_shifts: np.ndarray
    query_weight: np.ndarray
    query_wide: np.ndarray
    query_limit: np.ndarray
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
    boom_wide: np.ndarray
    boom_limit: np.ndarray
    boom_multiplier: np.ndarray
    boom_bias: np.ndarray
    boom_shift: np.ndarray
    boom_out: np.ndarray
    head_shifts: np.ndarray
    head_weight: np.ndarray
    head_wide: np.ndarray
    head_limit: np.ndarray
    head_multiplier: np.ndarray
    head_bias: np.ndarray
    head_shift: np.ndarray


class State(NamedTuple):
    """What is remembered of the text, and room to compute in."""

    h: np.ndarray  # int32 [L, H, B]
    c: np.ndarray  # int32 [L, H, B]
    memory: np.ndarray  # int8 [heads, B, rows, H], both filled up
    counts: np.ndarray  # int64 [2, B]: bytes read, and those of them that are not known
    coder: np.ndarray  # int64: low, range, position in the payload, code
    steps: np.ndarray  # int64 [1]
    before: np.ndarray  # int64 [B]: the last byte
    recent: np.ndarray  # int64 [longest n-gram, B]: what stands for the last bytes, newest first
    x: np.ndarray  # int32 [H, B]
    y: np.ndarray  # int32 [H, B]
    normal: np.ndarray  # int32 [H, B]
    sums: np.ndarray  # int64 [2, B]
    narrow: np.ndarray  # int16: activations
    hidden: np.ndarray  # int16: activations
    products: np.ndarray  # int32 [most rows, B]
    more_products: np.ndarray  # int32 [most rows, B]
    query: np.ndarray  # int16 [H]
    scores: np.ndarray  # int32 [rows]
    shares: np.ndarray  # int16 [rows]
    mix: np.ndarray  # int32 [H]
    weights: np.ndarray  # int64 [256]
    frequencies: np.ndarray  # int64 [256]


def _filled(array, multiples):
    """An array with zeros at the end of its dimensions, up to multiples of some numbers."""
    sizes = [-(-size // multiple) * multiple for size, multiple in zip(array.shape, multiples)]
    out = np.zeros(sizes, array.dtype)
    out[tuple(slice(0, size) for size in array.shape)] = array
    return out


def network(model):
    """The :class:`Network` of an :class:`~fairseq_sha.portable.model.IntegerModel`."""
    sizes, arrays = model.sizes, model.arrays._asdict()
    numbers = [CELLS.index(sizes.cell), sizes.width, sizes.layers, sizes.window, sizes.fraction]
    numbers += [math.isqrt(sizes.width << 64), query_limit(sizes.width), sizes.ngram_buckets]
    arrays["numbers"] = np.array(numbers, np.int64)
    arrays["head_of"] = np.full(sizes.layers, -1, np.int64)
    arrays["head_of"][list(sizes.attention_layers)] = np.arange(len(sizes.attention_layers))
    arrays["known"] = np.array(sizes.known, np.int64)
    arrays["ngram_orders"] = np.array(sizes.ngram_orders, np.int64)
    arrays["row_of"] = np.full(256, len(sizes.known), np.int64)
    arrays["row_of"][arrays["known"]] = np.arange(len(sizes.known))
    for name in ("cell", "hidden", "query", "boom", "head"):
        weight = arrays[f"{name}_weight"]
        arrays[f"{name}_limit"] = limits(weight)
        arrays[f"{name}_weight"] = _filled(weight, (1, TILE, PAIRS))
        arrays[f"{name}_wide"] = arrays[f"{name}_weight"].astype(np.int16)
    return Network(**{name: arrays[name] for name in Network._fields})


def start(model, streams):
    """The :class:`State` at the beginning of a text, for some streams."""
    sizes = model.sizes
    width, layers, heads = sizes.width, sizes.layers, len(sizes.attention_layers)
    batch = 1 if streams == 1 else -(-streams // LANES) * LANES
    full = -(-width // PAIRS) * PAIRS
    rows = -(-sizes.window // TILE) * TILE
    most = max(4, sizes.boom_multiple) * width
    most = -(-max(most, len(sizes.known)) // TILE) * TILE
    shapes = {
        "h": (np.int32, (layers, width, batch)),
        "c": (np.int32, (layers, width, batch)),
        "memory": (np.int8, (heads, batch, rows, full)),
        "counts": (np.int64, (2, batch)),
        "coder": (np.int64, (4,)),
        "steps": (np.int64, (1,)),
        "before": (np.int64, (batch,)),
        "recent": (np.int64, (max(sizes.ngram_orders, default=0), batch)),
        "x": (np.int32, (width, batch)),
        "y": (np.int32, (width, batch)),
        "normal": (np.int32, (width, batch)),
        "sums": (np.int64, (2, batch)),
        "narrow": (np.int16, (full // 2, batch, 2)),
        "hidden": (np.int16, (full // 2, batch, 2)),
        "products": (np.int32, (most, batch)),
        "more_products": (np.int32, (most, batch)),
        "query": (np.int16, (full,)),
        "scores": (np.int32, (rows,)),
        "shares": (np.int16, (rows,)),
        "mix": (np.int32, (full,)),
        "weights": (np.int64, (256,)),
        "frequencies": (np.int64, (256,)),
    }
    state = State(**{name: np.zeros(shape, kind) for name, (kind, shape) in shapes.items()})
    state.before[:] = coder.FIRST
    return state


@inner
def clamp(x):
    return min(max(x, -MOST_VALUE), MOST_VALUE)


@inner
def sigmoid(table, x, fraction):
    index = (x >> (fraction - SIGMOID_BITS)) + SIGMOID_ENTRIES // 2
    return np.int64(table[min(max(index, 0), SIGMOID_ENTRIES - 1)])


@inner
def tanh(table, x, fraction):
    return 2 * sigmoid(table, 2 * x, fraction) - (1 << SHARE_BITS)


@inner
def exp_minus(table, x):
    return np.int64(table[x]) if x < EXP_ENTRIES else 0


@inner
def narrow(x, shift, limit, out):
    half = (1 << shift) >> 1
    for i in range(x.shape[0]):
        for b in range(x.shape[1]):
            out[i >> 1, b, i & 1] = min(max((x[i, b] + half) >> shift, -limit), limit)


@inner
def product(weight, wide, x, rows, out):
    streams = out.shape[1]
    if streams == 1:
        flat_x, flat_out = x.reshape(x.size), out.reshape(out.size)
        for row in range(0, rows, TILE):
            tile_of_rows(flat_out, weight, flat_x, row)
    else:
        for row in range(0, rows, TILE):
            for stream in range(0, streams, LANES):
                tile_of_streams(out, wide, x, row, stream)


@inner
def to_values(products, multiplier, bias, shift):
    """``(products * multiplier + bias) >> shift``, in place."""
    for row in range(multiplier.shape[0]):
        m, a = np.int64(multiplier[row]), bias[row]
        for b in range(products.shape[1]):
            products[row, b] = clamp((products[row, b] * m + a) >> shift)


@inner
def isqrt(x):
    if x == 0:
        return x
    bits, rest = 0, x
    while rest > 0:
        rest >>= 1
        bits += 1
    root = np.int64(1) << ((bits + 1) // 2)
    while True:
        less = (root + x // root) >> 1
        if less >= root:
            return root
        root = less


@inner
def normalise(x, root_width, sums, out):
    """``x - mean`` divided by the standard deviation, with ``NORM_BITS`` bits after the point."""
    width, streams = x.shape
    sums[:] = 0
    for i in range(width):
        for b in range(streams):
            sums[0, b] += x[i, b]
    for b in range(streams):
        sums[0, b] = (sums[0, b] + width // 2) // width
    for i in range(width):
        for b in range(streams):
            d = x[i, b] - sums[0, b]
            sums[1, b] += d * d
    for b in range(streams):
        sums[1, b] = root_width // max(isqrt(sums[1, b]), 1)
    for i in range(width):
        for b in range(streams):
            out[i, b] = ((x[i, b] - sums[0, b]) * sums[1, b]) >> (32 - NORM_BITS)


@inner
def affine(normal, weights, fraction, out):
    """The weights and biases of a norm."""
    shift = 2 * NORM_BITS - fraction
    for i in range(normal.shape[0]):
        m, a = weights[0, i], weights[1, i]
        for b in range(normal.shape[1]):
            out[i, b] = clamp((normal[i, b] * m + a) >> shift)


@inner
def lstm(n, s, layer):
    """The input is in ``s.x`` and so is the output."""
    fraction, width, streams = n.numbers[4], s.x.shape[0], s.x.shape[1]
    narrow(s.x, n.cell_shifts[layer, 0], n.cell_limit[layer], s.narrow)
    narrow(s.h[layer], n.cell_shifts[layer, 1], n.hidden_limit[layer], s.hidden)
    product(n.cell_weight[layer], n.cell_wide[layer], s.narrow, 4 * width, s.products)
    product(n.hidden_weight[layer], n.hidden_wide[layer], s.hidden, 4 * width, s.more_products)
    shift = n.cell_shift[layer]
    for row in range(4 * width):
        m, m_hidden = np.int64(n.cell_multiplier[layer, row]), n.hidden_multiplier[layer, row]
        a = n.cell_bias[layer, row]
        for b in range(streams):
            total = s.products[row, b] * m + a + s.more_products[row, b] * np.int64(m_hidden)
            s.products[row, b] = clamp(total >> shift)
    for j in range(width):
        for b in range(streams):
            i = sigmoid(n.sigmoid, s.products[j, b], fraction)
            f = sigmoid(n.sigmoid, s.products[width + j, b], fraction)
            g = tanh(n.sigmoid, s.products[2 * width + j, b], fraction)
            o = sigmoid(n.sigmoid, s.products[3 * width + j, b], fraction)
            new = ((i * g) << fraction) >> SHARE_BITS
            c = clamp((f * s.c[layer, j, b] + new + HALF_SHARE) >> SHARE_BITS)
            s.c[layer, j, b] = c
            out = o * tanh(n.sigmoid, c, fraction)
            h = (out + (1 << (29 - fraction))) >> (30 - fraction)
            s.h[layer, j, b] = h
            s.x[j, b] = h


@inner
def sru(n, s, layer):
    fraction, width, streams = n.numbers[4], s.x.shape[0], s.x.shape[1]
    narrow(s.x, n.cell_shifts[layer, 0], n.cell_limit[layer], s.narrow)
    product(n.cell_weight[layer], n.cell_wide[layer], s.narrow, 3 * width, s.products)
    to_values(s.products, n.cell_multiplier[layer], n.cell_bias[layer], n.cell_shift[layer])
    for j in range(width):
        v_f, v_r = np.int64(n.state_weight[layer, 0, j]), np.int64(n.state_weight[layer, 1, j])
        for b in range(streams):
            c, x, u = np.int64(s.c[layer, j, b]), np.int64(s.x[j, b]), np.int64(s.products[j, b])
            to_f = clamp(s.products[width + j, b] + (v_f * c >> NORM_BITS))
            to_r = clamp(s.products[2 * width + j, b] + (v_r * c >> NORM_BITS))
            f, r = sigmoid(n.sigmoid, to_f, fraction), sigmoid(n.sigmoid, to_r, fraction)
            c = clamp(u + ((f * (c - u) + HALF_SHARE) >> SHARE_BITS))
            s.c[layer, j, b] = c
            s.x[j, b] = clamp(x + ((r * (c - x) + HALF_SHARE) >> SHARE_BITS))


@inner
def min_gru(n, s, layer):
    fraction, width, streams = n.numbers[4], s.x.shape[0], s.x.shape[1]
    narrow(s.x, n.cell_shifts[layer, 0], n.cell_limit[layer], s.narrow)
    product(n.cell_weight[layer], n.cell_wide[layer], s.narrow, 2 * width, s.products)
    to_values(s.products, n.cell_multiplier[layer], n.cell_bias[layer], n.cell_shift[layer])
    for j in range(width):
        for b in range(streams):
            y, h = np.int64(s.products[j, b]), np.int64(s.h[layer, j, b])
            z = sigmoid(n.sigmoid, s.products[width + j, b], fraction)
            g = (sigmoid(n.sigmoid, y, fraction) << fraction) >> SHARE_BITS
            if y >= 0:
                g = y + (1 << (fraction - 1))
            h = clamp(h + ((z * (g - h) + HALF_SHARE) >> SHARE_BITS))
            s.h[layer, j, b] = h
            s.x[j, b] = h


@inner
def attention(n, s, head):
    """The cell's output is in ``s.x``; the sum of its norm and of the attention replaces it."""
    width, streams = s.x.shape
    fraction, window = n.numbers[4], n.numbers[3]
    root_width, most = n.numbers[5], n.numbers[6]
    shifts = n.attention_shifts[head]
    half = (1 << shifts[2]) >> 1
    normalise(s.x, root_width, s.sums, s.normal)
    affine(s.normal, n.memory_norm[head], fraction, s.y)
    place = s.steps[0] % window
    for b in range(streams):
        for i in range(width):
            own = (s.y[i, b] + half) >> shifts[2]
            s.memory[head, b, place, i] = min(max(own, -MOST_MEMORY), MOST_MEMORY)
    affine(s.normal, n.middle_norm[head], fraction, s.x)
    narrow(s.x, shifts[0], n.query_limit[head], s.narrow)
    product(n.query_weight[head], n.query_wide[head], s.narrow, width, s.products)
    to_values(s.products, n.query_multiplier[head], n.query_bias[head], n.query_shift[head])
    normalise(s.products[:width], root_width, s.sums, s.normal)
    affine(s.normal, n.query_norm[head], fraction, s.y)
    rows = min(s.steps[0] + 1, window)
    multiplier = n.score_multiplier[head]
    half = (1 << shifts[1]) >> 1
    for b in range(streams):
        for i in range(width):
            s.query[i] = min(max((s.y[i, b] + half) >> shifts[1], -most), most)
        memory = s.memory[head, b]
        for row in range(0, rows, TILE):
            tile_of_rows(s.scores, memory, s.query, row)
        best = s.scores[0]
        for row in range(rows):
            best = max(best, s.scores[row])
        total = np.int64(0)
        for row in range(rows):
            below = ((np.int64(best) - s.scores[row]) * multiplier) >> SCORE_BITS
            share = exp_minus(n.exp, below) >> (24 - SHARE_BITS)
            s.shares[row] = share
            total += share
        extra = 0
        while (total >> extra) >> MIX_BITS > 0:
            extra += 1
        total = 0
        for row in range(rows):
            share = s.shares[row] >> extra
            s.shares[row] = share
            total += share
        # Rows after these are those of no step yet, and their shares are 0.
        for column in range(0, memory.shape[1], PAIRS):
            mix_rows(s.mix, memory, s.shares, rows, column)
        inverse = (np.int64(1) << 40) // total
        for i in range(width):
            mean = (s.mix[i] * inverse) >> 20
            mixed = clamp((mean * n.value_gate[head, i]) >> (20 + GATE_BITS))
            s.x[i, b] = clamp(s.x[i, b] + mixed)


@inner
def boom(n, s, layer):
    """``s.normal`` to ``s.y``."""
    fraction, width, streams = n.numbers[4], s.x.shape[0], s.x.shape[1]
    affine(s.normal, n.boom_norm[layer], fraction, s.y)
    narrow(s.y, n.boom_shifts[layer, 0], n.boom_limit[layer], s.narrow)
    rows = n.boom_multiplier.shape[1]
    product(n.boom_weight[layer], n.boom_wide[layer], s.narrow, rows, s.products)
    to_values(s.products, n.boom_multiplier[layer], n.boom_bias[layer], n.boom_shift[layer])
    out = n.boom_out[0]
    for i in range(width):
        sums = s.sums[0]
        sums[:] = 0
        for row in range(i, rows, width):
            for b in range(streams):
                y = np.int64(s.products[row, b])
                sums[b] += y * sigmoid(n.sigmoid, y, fraction)
        for b in range(streams):
            s.y[i, b] = clamp((sums[b] * out) >> (SHARE_BITS + NORM_BITS))


@inner
def add_ngrams(n, s, b, token):
    """Add to ``s.x`` what is embedded of the n-grams that end in a token of one stream."""
    longest, buckets = s.recent.shape[0], n.numbers[7]
    for age in range(longest - 1, 0, -1):
        s.recent[age, b] = s.recent[age - 1, b]
    s.recent[0, b] = token
    for k in range(n.ngram_orders.shape[0]):
        hashed = np.int64(0)
        for age in range(n.ngram_orders[k]):
            hashed = (hashed + s.recent[age, b] + 1) * FACTOR % PRIME
        row = k * buckets + hashed % buckets
        multiplier = np.int64(n.ngram_multiplier[row])
        for i in range(s.x.shape[0]):
            s.x[i, b] += n.ngram_weight[row, i] * multiplier
    for i in range(s.x.shape[0]):
        s.x[i, b] = clamp(s.x[i, b])


@inner
def step(n, s):
    """Read ``s.before``; logits are in the first rows of ``s.products``."""
    width, streams = s.x.shape
    cell, layers, fraction, root_width = n.numbers[0], n.numbers[2], n.numbers[4], n.numbers[5]
    for b in range(streams):
        row = n.row_of[s.before[b]]
        for i in range(width):
            s.x[i, b] = np.int32(n.embedding[row, i]) << EMBEDDING_BITS
        if n.ngram_orders.size > 0:
            add_ngrams(n, s, b, n.ngram_tokens[row])
    for layer in range(layers):
        normalise(s.x, root_width, s.sums, s.normal)
        affine(s.normal, n.start_norm[layer], fraction, s.x)
        if cell == LSTM:
            lstm(n, s, layer)
        elif cell == SRU:
            sru(n, s, layer)
        else:
            min_gru(n, s, layer)
        if n.head_of[layer] >= 0:
            attention(n, s, n.head_of[layer])
        normalise(s.x, root_width, s.sums, s.normal)
        boom(n, s, layer)
        affine(s.normal, n.residual_norm[layer], fraction, s.x)
        for i in range(width):
            for b in range(streams):
                s.x[i, b] = clamp(s.x[i, b] + s.y[i, b])
    s.steps[0] += 1
    narrow(s.x, n.head_shifts[0, 0], n.head_limit[0], s.narrow)
    product(n.head_weight[0], n.head_wide[0], s.narrow, n.head_multiplier.shape[1], s.products)
    to_values(s.products, n.head_multiplier[0], n.head_bias[0], n.head_shift[0])


@inner
def frequencies(n, s, b, temperature):
    """Of one stream, in ``s.frequencies``."""
    known = n.known.shape[0]
    unknown = 256 - known
    rest = np.int64((1 << TOTAL_BITS) - known)
    each = np.int64(0)
    if unknown > 0:
        mass = (1 << (TOTAL_BITS - 8)) * (256 * s.counts[1, b] + 1) // (s.counts[0, b] + 1)
        each = max(min(mass, 1 << (TOTAL_BITS - 1)) // unknown, 1)
        rest -= unknown * each
    s.frequencies[:] = each
    best, place = s.products[0, b], 0
    for i in range(known):
        if s.products[i, b] > best:
            best, place = s.products[i, b], i
    total = np.int64(0)
    for i in range(known):
        below = ((np.int64(best) - s.products[i, b]) * temperature) >> NORM_BITS
        s.weights[i] = exp_minus(n.exp, below >> (n.numbers[4] - EXP_BITS))
        total += s.weights[i]
    inverse = (rest << 32) // total
    left = rest
    for i in range(known):
        share = (s.weights[i] * inverse) >> 32
        left -= share
        s.frequencies[n.known[i]] = 1 + share
    s.frequencies[n.known[place]] += left
    return each


@inner
def encode_byte(c, payload, first, frequency):
    """See :class:`~fairseq_sha.portable.coder.Encoder`; ``c`` is low, range, position."""
    part = c[1] >> TOTAL_BITS
    c[0] += part * first
    c[1] = part * frequency
    if c[0] >> CODE_BITS:
        c[0] -= np.int64(1) << CODE_BITS
        place = c[2] - 1
        while place >= 0:
            payload[place] = (payload[place] + 1) & 255
            if payload[place]:
                break
            place -= 1
    while c[1] >> (CODE_BITS - WORD_BITS) == 0:
        payload[c[2]] = c[0] >> (CODE_BITS - 8)
        payload[c[2] + 1] = (c[0] >> (CODE_BITS - 16)) & 255
        c[2] += 2
        c[0] = (c[0] << WORD_BITS) & ((np.int64(1) << CODE_BITS) - 1)
        c[1] <<= WORD_BITS


@inner
def next_payload_byte(c, payload):
    """Zeros after the end: nothing outside the array is read, whatever the payload."""
    place = c[2]
    c[2] += 1
    return np.int64(payload[place]) if place < payload.shape[0] else np.int64(0)


@inner
def decode_byte(c, payload, table):
    """See :class:`~fairseq_sha.portable.coder.Decoder`; ``c`` is unused, range, position, code."""
    part = c[1] >> TOTAL_BITS
    value = min(c[3] // part, (1 << TOTAL_BITS) - 1)
    first, byte = np.int64(0), 0
    while first + table[byte] <= value:
        first += table[byte]
        byte += 1
    c[1] = part * table[byte]
    c[3] = min(c[3] - part * first, c[1] - 1)
    while c[1] >> (CODE_BITS - WORD_BITS) == 0:
        c[1] <<= WORD_BITS
        for _ in range(WORD_BITS // 8):
            c[3] = (c[3] << 8) | next_payload_byte(c, payload)
    return byte


@inner
def read_bytes(n, s, mode, data, length, payload, draws, temperature, steps):
    """Read some bytes of each stream.

    Args:
        n (Network), s (State): the model, and where it is
        mode (int): ``ENCODE``, ``DECODE`` or ``GENERATE``
        data (ndarray): uint8: the text; ``DECODE`` writes it, ``GENERATE`` its end
        length (int): bytes of each stream; streams lie one after another in ``data``
        payload (ndarray): uint8: the coded bytes, which ``ENCODE`` writes
        draws (ndarray): int64: for ``GENERATE``, random numbers of ``TOTAL_BITS`` bits, one for
            each byte that is drawn; the bytes before these are read from ``data``
        temperature (int): see :func:`frequencies`
        steps (int): how many bytes of each stream
    """
    for _ in range(steps):
        done = s.steps[0]
        active = (data.shape[0] - done + length - 1) // length
        step(n, s)
        for b in range(active):
            place = b * length + done
            each = frequencies(n, s, b, temperature)
            if mode == ENCODE:
                byte, first = np.int64(data[place]), np.int64(0)
                for i in range(byte):
                    first += s.frequencies[i]
                encode_byte(s.coder, payload, first, s.frequencies[byte])
            elif mode == DECODE:
                byte = np.int64(decode_byte(s.coder, payload, s.frequencies))
                data[place] = byte
            else:
                byte = np.int64(data[place])
                drawn = place - (data.shape[0] - draws.shape[0])
                if drawn >= 0:
                    byte = draw(n, s, draws[drawn], each)
                    data[place] = byte
            s.before[b] = byte
            s.counts[0, b] += 1
            if n.row_of[byte] == n.known.shape[0]:
                s.counts[1, b] += 1


@inner
def draw(n, s, number, each):
    """One of the bytes that the model knows."""
    known = n.known.shape[0]
    total = (1 << TOTAL_BITS) - (256 - known) * each
    left = (number * total) >> TOTAL_BITS
    i = 0
    while left >= s.frequencies[n.known[i]]:
        left -= s.frequencies[n.known[i]]
        i += 1
    return n.known[i]


def kept_for(sources):
    """:func:`read_bytes` for calls from Python. numba keeps it beside the package as long as the
    sources are the same, or compiles it in each process where it may not write.

    Args:
        sources (int): differs between versions of the sources. numba itself looks only at this
            file to see if what it keeps is still right, and at the values of free variables
    """

    def loop(n, s, mode, data, length, payload, draws, temperature, steps):
        _ = sources
        read_bytes(n, s, mode, data, length, payload, draws, temperature, steps)

    try:
        return njit(cache=True)(loop)
    except RuntimeError:  # numba's error if there is no folder that it may write
        return njit(loop)


SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(ngram_hash.__file__)]
run = kept_for(zlib.crc32(b"".join(path.read_bytes() for path in SOURCES)))


class NumbaForm:
    """What :class:`~fairseq_sha.portable.numpy_form.NumpyForm` is, compiled; the same methods.

    Args:
        model (~fairseq_sha.portable.model.IntegerModel): what to compute
    """

    def __init__(self, model):
        self.model = model
        self.network = network(model)

    def encode(self, data, streams, progress=None):
        text = np.frombuffer(data, np.uint8).copy()
        state = start(self.model, streams)
        state.coder[1] = 1 << CODE_BITS
        # A byte costs at most TOTAL_BITS bits and a little.
        payload = np.zeros(4 * len(text) + 16, np.uint8)
        self._run(state, ENCODE, text, streams, payload, progress)
        low, _, used, _ = state.coder.tolist()
        return coder.finished(payload[:used].tobytes(), low)

    def decode(self, payload, size, streams, progress=None):
        text = np.zeros(size, np.uint8)
        state = start(self.model, streams)
        start_of_code = payload[: CODE_BITS // 8].ljust(CODE_BITS // 8, b"\0")
        state.coder[:] = 0, 1 << CODE_BITS, CODE_BITS // 8, int.from_bytes(start_of_code, "big")
        payload = np.frombuffer(payload, np.uint8).copy()
        self._run(state, DECODE, text, streams, payload, progress)
        return text.tobytes()

    def generate(self, prompt, draws, temperature, progress=None):
        text = np.frombuffer(prompt + bytes(len(draws)), np.uint8).copy()
        state, nothing = start(self.model, 1), np.zeros(0, np.uint8)
        draws = np.array(draws, np.int64)
        self._run(state, GENERATE, text, 1, nothing, progress, draws, temperature)
        return text[len(prompt) :].tobytes()

    def _run(self, state, mode, text, streams, payload, progress, draws=None, temperature=None):
        length = stream_length(len(text), streams)
        draws = np.zeros(0, np.int64) if draws is None else draws
        temperature = 1 << NORM_BITS if temperature is None else temperature
        at_once = max(1, BYTES_PER_CALL // streams)
        for first in range(0, length, at_once):
            steps = min(at_once, length - first)
            run(self.network, state, mode, text, length, payload, draws, temperature, steps)
            if progress is not None:
                progress(coder.bytes_between(len(text), streams, first, first + steps))
