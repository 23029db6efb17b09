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


def _shuffle(builder, vector, order):
    kind = ir.VectorType(I32, len(order))
    mask = ir.Constant(kind, [ir.Constant(I32, i) for i in order])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _multiply_add(builder, a, b):
    """``a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]`` of two vectors of 16-bit numbers."""
    wide = ir.VectorType(I32, PAIRS)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even = _shuffle(builder, product, range(0, PAIRS, 2))
    odd = _shuffle(builder, product, range(1, PAIRS, 2))
    return builder.add(even, odd)


def _load(builder, data, offset, kind):
    """A vector that begins at an element of an array."""
    pointer = builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())
    return builder.load(pointer, align=kind.element.width // 8 if hasattr(kind, "count") else 1)


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
                pair = ir.VectorType(ir.IntType(16), 2)
                both = builder.bitcast(_load(builder, weight, builder.add(line, column), pair), I32)
                one = builder.insert_element(
                    ir.Constant(SUMS, ir.Undefined), both, ir.Constant(I32, 0)
                )
                same = builder.bitcast(_shuffle(builder, one, [0] * LANES), SHORTS)
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
        out: int32, of one dimension
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
        name = f"llvm.vector.reduce.add.v{LANES}i32"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, [SUMS]), name)
        for i, total in enumerate(sums):
            place = builder.gep(out, [builder.add(row, ir.Constant(row.type, i))])
            builder.store(builder.call(reduce, [builder.load(total)]), place)
        return context.get_dummy_value()

    return types.void(out, weight, x, types.intp), generate
