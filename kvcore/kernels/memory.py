"""Where everything lies: one header of int64 and flat arrays that it points to.

A call into compiled code costs about 0.1 µs per array, more than a lookup; so kernels take the
header alone and find the other arrays by the addresses in it. The arrays belong to
``kvcore.index_memory``, which rewrites an address whenever it replaces an array. Nothing else in
the arrays is a pointer: they can be written to disk and mapped elsewhere.

Row numbers and counters are int64 and keys are uint64, never mixed: numba adds the two as floats.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

# Inside, arrays are plain pointers: numba counts references to arrays, at every call.
HEADER = types.CPointer(types.int64)
ADDRESS = types.int64  # of the header, as Python passes it; and of other things


def inner(signature: Any) -> Any:
    """Compile a kernel that only kernels call."""
    options: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True}
    return njit(signature, **options)


def entry(signature: Any) -> Any:
    """Compile a kernel that Python calls."""
    return njit(signature, nogil=True)


def instruction(function: Callable) -> Any:
    """Be numba's ``intrinsic``, whose type leaves the typing context among the arguments."""
    return intrinsic(function)


# Four hash tables, each described by eleven consecutive words of the header from its base on.
# Their rows: [key u64][u32 that is 0 while the row is free][u32 next free row, or payload] …
BLOCKS, NAMES, COUNTS, SETS = 0, 16, 32, 48
TABLES = (BLOCKS, NAMES, COUNTS, SETS)
ROWS, STRIDE, HIGH, FREE, LIVE, LIMIT, INDEX, BITS, OLD, OLD_BITS, MOVED = range(11)

# Words of the header outside the tables.
AGES, WIDE, MEMBERS, MASK, DEAD, VICTIM, KEYS = range(64, 71)  # addresses
SET_WORDS, EPOCH, EPOCH_LEFT, EPOCH_LENGTH, SWEEP_TABLE, SWEEP_ROW = range(71, 77)
ADD_FROM, ADD_BIT, ADD_TO, DROP_FROM, DROP_BIT, DROP_TO = range(77, 83)  # memos of set changes
SEED, REPLACED, LAST_ROW, DONE, UNKNOWN = range(83, 88)
HEADER_SIZE = 96
ADDRESSES = (
    *(AGES, WIDE, MEMBERS, MASK, DEAD, VICTIM, KEYS),
    *(table + word for table in TABLES for word in (ROWS, INDEX, OLD)),
)

# Columns of the members array, one row of eight int64 per bit of a holder set.
SCOPE, SIBLING, HELD, COPIES, EXTRAS, MODE, EVICTED = range(7)
MEMBER_WORDS = 8
SELF_NAMED, OTHER_NAMED = 1, 2  # modes of a scope: how its engine has named blocks so far

WIDE_WORDS = 5  # an engine hash of up to 32 bytes, and its length
NAMED = np.uint16(1 << 15)  # in ages: the block has rows in NAMES; the other bits are the epoch
EPOCH_MASK = (1 << 15) - 1


def _pointer_to(width: int, pointed: types.Type) -> Any:
    @instruction
    def pointer(_context, address):
        if address not in (types.int64, types.uint64):
            raise TypingError("an address has 64 bits")

        def build(_ctx, builder, _sig, args):
            return builder.inttoptr(args[0], ir.IntType(width).as_pointer())

        return types.CPointer(pointed)(address), build

    return pointer


pointer64, pointer32 = _pointer_to(64, types.uint64), _pointer_to(32, types.uint32)
_pointer16, header_at = _pointer_to(16, types.uint16), _pointer_to(64, types.int64)


@inner(types.CPointer(types.uint64)(HEADER, types.int64))
def u64(header, word):
    """View the array whose address is in a word of the header as uint64."""
    return pointer64(header[word])


@inner(types.CPointer(types.uint32)(HEADER, types.int64))
def u32(header, word):
    """View the same bytes as uint32, little-endian halves."""
    return pointer32(header[word])


@inner(types.CPointer(types.uint16)(HEADER, types.int64))
def u16(header, word):
    """View the array as uint16."""
    return _pointer16(header[word])


@inner(types.CPointer(types.int64)(HEADER, types.int64))
def i64(header, word):
    """View the array as int64."""
    return header_at(header[word])


@instruction
def trailing_zeros(_context, word):
    """Return the number of the lowest set bit; 64 for zero."""
    if word != types.uint64:
        raise TypingError("the operand must be uint64")

    def build(_ctx, builder, _sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


@instruction
def _prefetch(_context, pointer):
    def build(_ctx, builder, _sig, args):
        byte_pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        of = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, of, name)
        address = builder.bitcast(args[0], byte_pointer)
        read, near, data = (ir.Constant(i32, n) for n in (0, 3, 1))
        builder.call(function, [address, read, near, data])
        return _ctx.get_dummy_value()

    return types.void(pointer), build


@inner(types.void(HEADER, types.int64, types.int64))
def prefetch32(header, word, i):
    """Have element ``i`` of a uint32 array fetched, which takes as long as it is waited for."""
    _prefetch(pointer32(header[word] + 4 * i))


_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


@inner(types.uint64(types.uint64))
def mix(word):
    """Spread a word over all 64 bits, one to one, so that the mixed value is as good a key."""
    word = (word ^ (word >> _30)) * _A
    word = (word ^ (word >> _27)) * _B
    return word ^ (word >> _31)
