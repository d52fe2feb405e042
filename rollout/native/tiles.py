"""The tile that products and attention are made of: a few rows times a panel of columns, all sums in registers.

It is written in LLVM's instructions, since no compiler finds it in a plain loop. Every sum goes over the inputs in
their order, by itself, so a row's bits are its own in a tile of any height. The layout is that of Goto and van de
Geijn, "Anatomy of high-performance matrix multiplication" (2008), for few rows.

Inputs are float32; the panel is float32, bfloat16 (uint16, widened), or, where both sides are bfloat16, pairs of
neighbouring inputs in 32 bits (uint32), which some processors multiply at once. Sums are float32.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic


def _features() -> set[str]:
    """What the processor that numba compiles for can do, `NUMBA_CPU_FEATURES` included."""
    settings: Any = config
    given = settings.CPU_FEATURES
    given = llvm.get_host_cpu_features().flatten() if given is None else given
    return {feature[1:] for feature in given.split(",") if feature.startswith("+")}


def _sizes(features: set[str]) -> tuple[int, tuple[int, ...]]:
    """Numbers in a vector, and rows of a tile, most first: their sums, the panel and a row fit in the registers."""
    if "avx512f" in features:
        return 16, (12, 8, 4, 2, 1)
    return (8, (6, 4, 2, 1)) if "avx2" in features else (4, (8, 4, 2, 1))


_MULTIPLIES_PAIRS = "avx512bf16" in _features()
_LANES, HEIGHTS = _sizes(_features())
PANEL = 2 * _LANES
"""Columns of a panel."""
_AHEAD = 2048
"""Bytes of a panel that are fetched before they are needed."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS = ir.VectorType(_F32, _LANES)
_STORED: dict[Any, Any] = {types.float32: _F32, types.uint16: _I16, types.uint32: _I32}


@intrinsic
def multiply_tile(
    context: Any, like: Any, height: Any, x: Any, x_step: Any, panel: Any, panel_step: Any, inputs: Any, start: Any,
    start_step: Any, out: Any, out_step: Any,
) -> Any:  # fmt: skip
    """`out[r] = start[r] + Σ_i x[r, i] · panel[i]` for `height` rows, one of `HEIGHTS`, and `PANEL` columns.

    All but the first are numbers: addresses, and steps in bytes from one row or input to the next. `like` is an array
    of the panel's type. The memory behind a panel is prefetched, never read.
    """

    def generate(target: Any, builder: Any, _: Any, values: Any) -> Any:
        end = builder.append_basic_block("end")
        switch = builder.switch(values[1], end)
        for height in HEIGHTS:
            block = builder.append_basic_block(f"rows{height}")
            switch.add_case(_I64(height), block)
            builder.position_at_end(block)
            _emit(builder, height, _STORED[like.dtype], *values[2:])
            builder.branch(end)
        builder.position_at_end(end)
        return target.get_dummy_value()

    return types.void(like, *[types.intp] * 10), generate


@njit(inline="always")
def height_of(rows: Any) -> Any:
    """Rows of the next tile when so many are left."""
    for height in HEIGHTS:
        if height <= rows:
            return height
    return 0


def _emit(
    b: Any, height: int, stored: Any, x: Any, x_step: Any, panel: Any, panel_step: Any, inputs: Any, start: Any,
    start_step: Any, out: Any, out_step: Any,
) -> None:  # fmt: skip
    """The loop over inputs."""
    rows = [_at(b, b.add(x, b.mul(x_step, _I64(r))), _I32 if stored is _I32 else _F32) for r in range(height)]
    first = [[b.load(place, align=4) for place in row] for row in _vectors(b, height, start, start_step)]
    before, loop, after = b.block, b.append_basic_block("input"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(_I64)
    sums = [[b.phi(_SUMS) for _ in range(2)] for _ in range(height)]
    here = b.add(panel, b.mul(i, panel_step))
    columns = [_columns(b, here, v, stored) for v in range(2)]
    new = []
    for row, totals in zip(rows, sums, strict=True):
        one = _broadcast(b, b.load(b.gep(row, [i])))
        new.append([_add_product(b, total, one, column) for total, column in zip(totals, columns, strict=True)])
    following = b.add(i, _I64(1))
    b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
    i.add_incoming(_I64(0), before)
    i.add_incoming(following, loop)
    b.position_at_end(after)
    results = _vectors(b, height, out, out_step)
    for r in range(height):
        for v in range(2):
            sums[r][v].add_incoming(first[r][v], before)
            sums[r][v].add_incoming(new[r][v], loop)
            b.store(new[r][v], results[r][v], align=4)


def _vectors(b: Any, height: int, address: Any, step: Any) -> list[list[Any]]:
    """The places of every row's two vectors."""
    places = [[b.add(b.mul(step, _I64(r)), _I64(v * _LANES * 4)) for v in range(2)] for r in range(height)]
    return [[_at(b, b.add(address, place), _SUMS) for place in row] for row in places]


def _columns(b: Any, here: Any, half: int, stored: Any) -> Any:
    """Half of a panel's columns for one input: float32, or pairs of bfloat16."""
    width = 2 if stored is _I16 else 4
    place = b.add(here, _I64(half * _LANES * width))
    _prefetch(b, b.add(place, _I64(_AHEAD)))
    columns = b.load(_at(b, place, ir.VectorType(stored, _LANES)), align=width)
    return _high(b, b.zext(columns, ir.VectorType(_I32, _LANES)), shift=True) if stored is _I16 else columns


def _at(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _broadcast(b: Any, number: Any) -> Any:
    kind = ir.VectorType(number.type, _LANES)
    none = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(none, number, _I32(0))
    return b.shuffle_vector(first, none, ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES))


def _add_product(b: Any, total: Any, x: Any, columns: Any) -> Any:
    if columns.type.element is not _I32:
        return _call(b, f"llvm.fma.v{_LANES}f32", _SUMS, [x, columns, total])
    if _MULTIPLIES_PAIRS:
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, [total, x, columns])
    for shift in (True, False):
        both = [_high(b, x, shift), _high(b, columns, shift)]
        total = _call(b, f"llvm.fma.v{_LANES}f32", _SUMS, [*both, total])
    return total


def _high(b: Any, bits: Any, shift: bool) -> Any:
    """The bfloat16 in the low (`shift`) or high half of 32 bits, as float32."""
    if shift:
        return b.bitcast(b.shl(bits, ir.Constant(bits.type, [16] * _LANES)), _SUMS)
    return b.bitcast(b.and_(bits, ir.Constant(bits.type, [0xFFFF0000] * _LANES)), _SUMS)


def _prefetch(b: Any, address: Any) -> None:
    place = _at(b, address, ir.IntType(8))
    _call(b, "llvm.prefetch.p0", ir.VoidType(), [place, _I32(0), _I32(3), _I32(1)])


def _call(b: Any, name: str, result: Any, values: list[Any]) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), values)
