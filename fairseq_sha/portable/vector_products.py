"""Products of integer matrices for numba, written for vector units.

numba makes good code of plain loops, but not of these: a product of 16-bit numbers that is added up
in 32 bits is one instruction on most processors (``pmaddwd``, ``vpdpwssd``, ``smlal``), and LLVM
recognises it only in the form that :func:`_multiply_add` gives it. What is written here is LLVM's
own language with vectors of a fixed width, which it cuts to the width of any processor. All sums
are of integers and fit 32 bits, so their order is of no consequence.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # sums in a vector
PAIRS = 2 * LANES  # 16-bit numbers in a vector
TILE = 8  # rows of a matrix that are done at once

I32 = ir.IntType(32)
SHORTS = ir.VectorType(ir.IntType(16), PAIRS)
SUMS = ir.VectorType(I32, LANES)


def _add_neighbours(builder, *vectors):
    """The sums of neighbours in one or two vectors, one after another."""
    size = sum(vector.type.count for vector in vectors)
    both = vectors if len(vectors) == 2 else (*vectors, ir.Constant(vectors[0].type, ir.Undefined))
    sides = []
    for first in (0, 1):
        order = [ir.Constant(I32, i) for i in range(first, size, 2)]
        mask = ir.Constant(ir.VectorType(I32, len(order)), order)
        sides.append(builder.shuffle_vector(*both, mask))
    return builder.add(*sides)


def _multiply_add(builder, a, b):
    """``a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]`` of two vectors of 16-bit numbers."""
    wide = ir.VectorType(I32, PAIRS)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return _add_neighbours(builder, product)


def _load(builder, data, offset, kind):
    """A vector that begins at an element of an array."""
    pointer = builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())
    return builder.load(pointer, align=kind.element.width // 8)


def _broadcast_pair(builder, data, offset):
    """Two 16-bit numbers of an array, again and again."""
    pair = _load(builder, data, offset, ir.VectorType(ir.IntType(16), 2))
    undefined = ir.Constant(SUMS, ir.Undefined)
    first = builder.insert_element(undefined, builder.bitcast(pair, I32), ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), None)
    return builder.bitcast(builder.shuffle_vector(first, undefined, zeros), SHORTS)


def _opened(context, builder, signature, args):
    """The data pointer and the shape of each array among the arguments; the others as they are."""
    for kind, value in zip(signature.args, args):
        if isinstance(kind, types.Array):
            array = context.make_array(kind)(context, builder, value)
            yield array.data, cgutils.unpack_tuple(builder, array.shape)
        else:
            yield value


@intrinsic
def tile_of_streams(typingctx, out, weight, x, row, stream):
    """``out[row : row + TILE, stream : stream + LANES] = weight x`` for many streams.

    Args:
        out: int32 ``[rows, B]``
        weight: int16 ``[rows, K]``
        x: int16 ``[K / 2, B, 2]``: two entries of each stream side by side
        row, stream: where
    """

    def generate(context, builder, signature, args):
        out, weight, x, row, stream = _opened(context, builder, signature, args)
        (out, (_, streams)), (weight, (_, width)), (x, (pairs, _, two)) = out, weight, x
        zero = ir.Constant(SUMS, None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(TILE)]
        step = builder.mul(streams, two)
        first = builder.mul(stream, two)
        with cgutils.for_range(builder, pairs) as loop:
            inputs = _load(builder, x, builder.add(first, builder.mul(loop.index, step)), SHORTS)
            column = builder.mul(loop.index, two)
            for i, total in enumerate(sums):
                line = builder.mul(builder.add(row, ir.Constant(row.type, i)), width)
                same = _broadcast_pair(builder, weight, builder.add(line, column))
                more = _multiply_add(builder, same, inputs)
                builder.store(builder.add(builder.load(total), more), total)
        for i, total in enumerate(sums):
            line = builder.mul(builder.add(row, ir.Constant(row.type, i)), streams)
            place = builder.gep(out, [builder.add(line, stream)])
            builder.store(builder.load(total), builder.bitcast(place, SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(out, weight, x, index, index), generate


@intrinsic
def tile_of_rows(typingctx, out, weight, x, row):
    """``out[row + i] = weight[row + i] . x`` for ``TILE`` rows ``i``.

    Args:
        out: int32, of one dimension, of a multiple of ``TILE`` entries
        weight: int8 or int16 ``[rows, K]``, with ``K`` a multiple of ``PAIRS``
        x: int16 ``[K]``
        row: where
    """

    def generate(context, builder, signature, args):
        bits = signature.args[1].dtype.bitwidth
        out, weight, x, row = _opened(context, builder, signature, args)
        (out, _), (weight, (_, width)), (x, _) = out, weight, x
        zero = ir.Constant(SUMS, None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(TILE)]
        stride = ir.Constant(row.type, PAIRS)
        with cgutils.for_range(builder, builder.sdiv(width, stride)) as loop:
            column = builder.mul(loop.index, stride)
            inputs = _load(builder, x, column, SHORTS)
            for i, total in enumerate(sums):
                line = builder.mul(builder.add(row, ir.Constant(row.type, i)), width)
                kind = ir.VectorType(ir.IntType(bits), PAIRS)
                weights = _load(builder, weight, builder.add(line, column), kind)
                if bits < 16:
                    weights = builder.sext(weights, SHORTS)
                more = _multiply_add(builder, weights, inputs)
                builder.store(builder.add(builder.load(total), more), total)
        # Add neighbours until each row has one sum: 8 vectors become 4, 2 and 1 of 16 numbers.
        vectors = [builder.load(total) for total in sums]
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2])
            vectors = [_add_neighbours(builder, first, second) for first, second in pairs]
        totals = _add_neighbours(builder, vectors[0])
        place = builder.bitcast(builder.gep(out, [row]), totals.type.as_pointer())
        builder.store(totals, place, align=4)
        return context.get_dummy_value()

    return types.void(out, weight, x, types.intp), generate


@intrinsic
def mix_rows(typingctx, out, rows, shares, number, column):
    """``out[column + i] = sum over j of shares[j] rows[j, column + i]`` for ``PAIRS`` columns ``i``
    and ``number`` rows.

    Args:
        out: int32, of one dimension
        rows: int8 ``[N, K]``
        shares: int16 ``[N]``; those after ``number`` rows, up to an even number, must be 0
        number, column: how many rows, which columns
    """

    def generate(context, builder, signature, args):
        out, rows, shares, number, column = _opened(context, builder, signature, args)
        (out, _), (rows, (_, width)), (shares, _) = out, rows, shares
        one, two = ir.Constant(number.type, 1), ir.Constant(number.type, 2)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(SUMS, None)) for _ in range(2)]
        bytes_of_row = ir.VectorType(ir.IntType(8), PAIRS)
        # The entries of two rows side by side, as those of x in tile_of_streams.
        order = [ir.Constant(I32, i + side * PAIRS) for i in range(PAIRS) for side in (0, 1)]
        halves = order[:PAIRS], order[PAIRS:]
        with cgutils.for_range(builder, builder.sdiv(builder.add(number, one), two)) as loop:
            first = builder.mul(loop.index, two)
            offset = builder.add(builder.mul(first, width), column)
            upper = _load(builder, rows, offset, bytes_of_row)
            lower = _load(builder, rows, builder.add(offset, width), bytes_of_row)
            weights = _broadcast_pair(builder, shares, first)
            for total, half in zip(sums, halves):
                mask = ir.Constant(ir.VectorType(I32, PAIRS), half)
                entries = builder.sext(builder.shuffle_vector(upper, lower, mask), SHORTS)
                more = _multiply_add(builder, weights, entries)
                builder.store(builder.add(builder.load(total), more), total)
        for i, total in enumerate(sums):
            place = builder.gep(out, [builder.add(column, ir.Constant(column.type, i * LANES))])
            builder.store(builder.load(total), builder.bitcast(place, SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(out, rows, shares, index, index), generate
