"""The integer model in numpy: slow, and written to be read beside the paper and the modules.

It is the definition of what :mod:`fairseq_sha.portable.numba_form` computes, bit for bit. Arrays
are int64 unless said otherwise; ``B`` streams are read side by side.
"""

import math

import numpy as np

from fairseq_sha.ngram_hash import ngram_rows
from fairseq_sha.packed_file import stream_length
from fairseq_sha.portable import coder
from fairseq_sha.portable.model import (
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

HALF_SHARE = 1 << (SHARE_BITS - 1)


class Reader:
    """Reads a byte of each stream, and says what may come next.

    Args:
        model (~fairseq_sha.portable.model.IntegerModel): what to compute
        streams (int): ``B``
    """

    def __init__(self, model, streams):
        self.sizes, self.arrays = sizes, arrays = model.sizes, model.arrays
        width, heads = sizes.width, len(sizes.attention_layers)
        # int64 [layers, B, H]; the LSTM has both, SRU only c and minGRU only h.
        self.h = np.zeros((sizes.layers, streams, width), np.int64)
        self.c = np.zeros((sizes.layers, streams, width), np.int64)
        # A ring: row t mod window is that of step t. Sums of integers do not depend on the order.
        self.memory = np.zeros((heads, streams, sizes.window, width), np.int8)
        #: What stands for the last bytes in hashes of n-grams, the oldest first; 0 before the text.
        self.recent = np.zeros((max(sizes.ngram_orders, default=0), streams), np.int64)
        self.steps = 0
        #: Bytes read of each stream, and how many of them the model does not know.
        self.read = np.zeros(streams, np.int64)
        self.unknown = np.zeros(streams, np.int64)
        self.known = np.array(sizes.known, np.int64)
        self.row_of = np.full(256, len(self.known), np.int64)
        self.row_of[self.known] = np.arange(len(self.known))
        self.limits = {
            name: limits(getattr(arrays, f"{name}_weight"))
            for name in ("cell", "hidden", "query", "boom", "head")
        }
        self.root_width = math.isqrt(width << 64)

    def step(self, before):
        """Read the bytes ``before [B]`` and give logits: values ``[B, S]`` of the known bytes."""
        h = self._embed(self.row_of[before])
        for layer in range(self.sizes.layers):
            h = self._layer(layer, h)
        self.steps += 1
        return self._linear("head", 0, self._activation("head", 0, h))

    def _embed(self, rows):
        """Rows of the embedding ``[B]`` to values ``[B, H]``, with n-grams that end there."""
        sizes, arrays = self.sizes, self.arrays
        h = arrays.embedding[rows].astype(np.int64) << EMBEDDING_BITS
        if sizes.ngram_orders:
            self.recent = np.concatenate([self.recent[1:], arrays.ngram_tokens[rows][None]])
            for row in ngram_rows(self.recent, sizes.ngram_orders, sizes.ngram_buckets):
                multiplier = arrays.ngram_multiplier[row[0], None].astype(np.int64)
                h += arrays.ngram_weight[row[0]] * multiplier
        return clamp(h)

    def _layer(self, layer, h):
        """As ``SHARNNLayer.forward``: values ``[B, H]`` to values ``[B, H]``."""
        arrays = self.arrays
        h = getattr(self, f"_{self.sizes.cell}")(layer, self._norm(h, arrays.start_norm[layer]))
        if layer in self.sizes.attention_layers:
            head = self.sizes.attention_layers.index(layer)
            own = self._norm(h, arrays.memory_norm[head])
            own = narrow(own, arrays.attention_shifts[head, 2], MOST_MEMORY)
            self.memory[head, :, self.steps % self.sizes.window] = own
            h = self._norm(h, arrays.middle_norm[head])
            h = clamp(h + self._attention(head, h))
        boomed = self._boom(layer, self._norm(h, arrays.boom_norm[layer]))
        return clamp(self._norm(h, arrays.residual_norm[layer]) + boomed)

    def _lstm(self, layer, x):
        """i, f, g, o = W_ih x + W_hh h + b; c = f c + i g; h = o tanh(c)."""
        arrays, fraction = self.arrays, self.sizes.fraction
        sums = product(self._activation("cell", layer, x), arrays.cell_weight[layer])
        hidden = narrow(self.h[layer], arrays.cell_shifts[layer, 1], self.limits["hidden"][layer])
        total = sums * arrays.cell_multiplier[layer] + arrays.cell_bias[layer]
        total += product(hidden, arrays.hidden_weight[layer]) * arrays.hidden_multiplier[layer]
        i, f, g, o = np.split(clamp(total >> arrays.cell_shift[layer]), 4, axis=1)
        i, f, g, o = self._sigmoid(i), self._sigmoid(f), self._tanh(g), self._sigmoid(o)
        new = (i * g << fraction) >> SHARE_BITS
        self.c[layer] = clamp((f * self.c[layer] + new + HALF_SHARE) >> SHARE_BITS)
        out = o * self._tanh(self.c[layer])
        self.h[layer] = (out + (1 << (29 - fraction))) >> (30 - fraction)
        return self.h[layer]

    def _sru(self, layer, x):
        """f, r = sigmoid(W x + b + v c); c = u + f (c - u); out = x + r (c - x)."""
        arrays = self.arrays
        u, f, r = np.split(self._linear("cell", layer, self._activation("cell", layer, x)), 3, 1)
        c, v = self.c[layer], arrays.state_weight[layer].astype(np.int64)
        f = self._sigmoid(clamp(f + (v[0] * c >> NORM_BITS)))
        r = self._sigmoid(clamp(r + (v[1] * c >> NORM_BITS)))
        c = clamp(u + ((f * (c - u) + HALF_SHARE) >> SHARE_BITS))
        self.c[layer] = c
        return clamp(x + ((r * (c - x) + HALF_SHARE) >> SHARE_BITS))

    def _min_gru(self, layer, x):
        """h = h + z (g(candidate) - h), where g(y) is y + 1/2 from 0 on, else sigmoid(y)."""
        fraction = self.sizes.fraction
        y, z = np.split(self._linear("cell", layer, self._activation("cell", layer, x)), 2, 1)
        below = (self._sigmoid(y) << fraction) >> SHARE_BITS
        g = np.where(y >= 0, y + (1 << (fraction - 1)), below)
        h = self.h[layer]
        self.h[layer] = clamp(h + ((self._sigmoid(z) * (g - h) + HALF_SHARE) >> SHARE_BITS))
        return self.h[layer]

    def _attention(self, head, h):
        """One query for each stream, over the rows of its memory: values ``[B, H]``."""
        arrays = self.arrays
        x = narrow(h, arrays.attention_shifts[head, 0], self.limits["query"][head])
        query = self._norm(self._linear("query", head, x), arrays.query_norm[head])
        query = narrow(query, arrays.attention_shifts[head, 1], query_limit(self.sizes.width))
        rows = self.memory[head, :, : min(self.steps + 1, self.sizes.window)].astype(np.int64)
        scores = np.einsum("bh,bkh->bk", query, rows)
        below = (scores.max(1, keepdims=True) - scores) * arrays.score_multiplier[head]
        shares = exp_minus(arrays, below >> SCORE_BITS) >> (24 - SHARE_BITS)
        # Fewer bits for flat weights: their sum times the largest entry of a row fits 32 bits.
        total = shares.sum(1, keepdims=True)
        shares >>= np.maximum(bit_length(total) - MIX_BITS, 0)
        mix = np.einsum("bk,bkh->bh", shares, rows)
        mean = (mix * ((1 << 40) // shares.sum(1, keepdims=True))) >> 20
        return clamp((mean * arrays.value_gate[head]) >> (20 + GATE_BITS))

    def _boom(self, layer, x):
        """The sum of ``gelu(W x + b)`` over chunks; gelu(y) = silu(1.702 y) / 1.702, and the matrix
        holds the first factor."""
        y = self._linear("boom", layer, self._activation("boom", layer, x))
        gelu = (y * self._sigmoid(y)).reshape(len(y), -1, self.sizes.width).sum(1)
        return clamp((gelu * self.arrays.boom_out[0]) >> (SHARE_BITS + NORM_BITS))

    def _norm(self, x, weights):
        """Layer normalisation without epsilon: values to values.

        With d = x - mean: d sqrt(H) / sqrt(sum d^2) times weight, plus bias.
        """
        mean = (x.sum(1, keepdims=True) + self.sizes.width // 2) // self.sizes.width
        d = x - mean
        root = np.maximum(isqrt((d * d).sum(1, keepdims=True)), 1)
        normal = (d * (self.root_width // root)) >> (32 - NORM_BITS)
        total = normal * weights[0] + weights[1]
        return clamp(total >> (2 * NORM_BITS - self.sizes.fraction))

    def _activation(self, matrix, index, x):
        shift = getattr(self.arrays, f"{matrix}_shifts")[index, 0]
        return narrow(x, shift, self.limits[matrix][index])

    def _linear(self, matrix, index, x):
        """``W x + b``: activations ``[B, H]`` to values ``[B, rows]``."""
        weight, multiplier, bias, shift = (
            getattr(self.arrays, f"{matrix}_{part}")[index]
            for part in ("weight", "multiplier", "bias", "shift")
        )
        return clamp((product(x, weight) * multiplier + bias) >> shift)

    def _sigmoid(self, x):
        """Values to shares."""
        index = (x >> (self.sizes.fraction - SIGMOID_BITS)) + SIGMOID_ENTRIES // 2
        return self.arrays.sigmoid[np.clip(index, 0, SIGMOID_ENTRIES - 1)].astype(np.int64)

    def _tanh(self, x):
        """2 sigmoid(2 x) - 1: values to shares with a sign."""
        return 2 * self._sigmoid(2 * x) - (1 << SHARE_BITS)

    def frequencies(self, logits, temperature=1 << NORM_BITS):
        """What the coder assumes: int64 array ``[B, 256]`` of positive numbers, each row of which
        sums up to ``2^TOTAL_BITS``.

        A byte that the model does not know gets a share of how often such bytes came before, which
        is 1 in 256 for the first byte of a stream.

        Args:
            logits (ndarray): values ``[B, S]``
            temperature (int): a factor on logits, with ``NORM_BITS`` bits after the point
        """
        known, unknown = len(self.known), 256 - len(self.known)
        out = np.ones((len(logits), 256), np.int64)
        if unknown:
            mass = (1 << (TOTAL_BITS - 8)) * (256 * self.unknown + 1) // (self.read + 1)
            each = np.maximum(np.minimum(mass, 1 << (TOTAL_BITS - 1)) // unknown, 1)
            out[:] = each[:, None]
            rest = (1 << TOTAL_BITS) - known - unknown * each[:, None]
        else:
            rest = np.full((len(logits), 1), (1 << TOTAL_BITS) - known)
        best = logits.argmax(1)
        below = (logits.max(1, keepdims=True) - logits) * temperature >> NORM_BITS
        weights = exp_minus(self.arrays, below >> (self.sizes.fraction - EXP_BITS))
        inverse = (rest << 32) // weights.sum(1, keepdims=True)
        mine = 1 + ((weights * inverse) >> 32)
        lines = np.arange(len(logits))
        mine[lines, best] += rest[:, 0] + known - mine.sum(1)
        out[:, self.known] = mine
        return out

    def count(self, read):
        """Take note of the bytes ``read``, one of each of the first streams."""
        self.read[: len(read)] += 1
        self.unknown[: len(read)] += self.row_of[read] == len(self.known)


class NumpyForm:
    """Codes and generates.

    Args:
        model (~fairseq_sha.portable.model.IntegerModel): what predicts the next byte
    """

    def __init__(self, model):
        self.model = model

    def encode(self, data, streams, progress=None):
        """See :meth:`fairseq_sha.portable.PortableModel.encode`."""
        encoder = coder.Encoder()

        def code(frequencies, place):
            byte = data[place]
            encoder.put(int(frequencies[:byte].sum()), int(frequencies[byte]))
            return byte

        self._run(len(data), streams, code, progress)
        return encoder.finish()

    def decode(self, payload, size, streams, progress=None):
        """See :meth:`fairseq_sha.portable.PortableModel.decode`."""
        decoder, text = coder.Decoder(payload), bytearray(size)

        def code(frequencies, place):
            ends = frequencies.cumsum()
            byte = int(np.searchsorted(ends, decoder.where(), side="right"))
            decoder.take(int(ends[byte] - frequencies[byte]), int(frequencies[byte]))
            text[place] = byte
            return byte

        self._run(size, streams, code, progress)
        return bytes(text)

    def generate(self, prompt, draws, temperature, progress=None):
        """See :meth:`fairseq_sha.portable.PortableModel.generate`.

        Args:
            prompt (bytes): may be empty
            draws (list of int): random numbers of ``TOTAL_BITS`` bits, one for each byte
            temperature (int): a factor on logits, with ``NORM_BITS`` bits after the point
        """
        text, known = bytearray(prompt) + bytes(len(draws)), list(self.model.sizes.known)

        def code(frequencies, place):
            if place >= len(prompt):
                ends = frequencies[known].cumsum()
                number = (draws[place - len(prompt)] * int(ends[-1])) >> TOTAL_BITS
                text[place] = known[int(np.searchsorted(ends, number, side="right"))]
            return text[place]

        self._run(len(text), 1, code, progress, temperature)
        return bytes(text[len(prompt) :])

    def _run(self, size, streams, code, progress, temperature=1 << NORM_BITS):
        """``code`` is given the frequencies of a stream's next byte and its place in the block,
        and gives the byte."""
        length = stream_length(size, streams)
        reader = Reader(self.model, streams)
        before = np.full(streams, coder.FIRST)
        for done in range(length):
            table = reader.frequencies(reader.step(before), temperature)
            active = coder.bytes_between(size, streams, done, done + 1)
            for stream in range(active):
                before[stream] = code(table[stream], stream * length + done)
            reader.count(before[:active])
            if progress is not None:
                progress(active)


def product(x, weight):
    """``x W^T``, activations ``[B, H]`` and int8 ``[rows, H]`` to ``[B, rows]``. Fits 32 bits."""
    sums = np.matmul(x.astype(np.int32), weight.T.astype(np.int32))
    return sums.astype(np.int64)


def clamp(x):
    """Numbers to values."""
    return np.clip(x, -MOST_VALUE, MOST_VALUE)


def narrow(x, shift, limit):
    """Values to activations: ``x / 2^shift``, rounded, from ``-limit`` to ``limit``."""
    return np.clip((x + ((1 << int(shift)) >> 1)) >> shift, -limit, limit)


def exp_minus(arrays, x):
    """``exp(-x)``, with 24 bits after the point, for ``x >= 0`` in steps of ``2^-EXP_BITS``; 0 from
    16 on."""
    return np.where(x < EXP_ENTRIES, arrays.exp[np.minimum(x, EXP_ENTRIES - 1)], 0).astype(np.int64)


def bit_length(x):
    """The number of bits of integers below ``2^62`` that are not negative."""
    out = np.zeros_like(x)
    for bits in (32, 16, 8, 4, 2, 1):
        more = (x >> bits) > 0
        out += np.where(more, bits, 0)
        x = np.where(more, x >> bits, x)
    return out + (x > 0)


def isqrt(x):
    """``floor(sqrt(x))`` of integers below ``2^62`` that are not negative, by Newton's method from
    above, which falls until it is there."""
    root = 1 << ((bit_length(x) + 1) // 2)
    for _ in range(7):
        root = np.minimum(root, (root + x // np.maximum(root, 1)) >> 1)
    return root
