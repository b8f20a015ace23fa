"""The same arithmetic as `arithmetic.py`, bit for bit, in compiled loops that release the GIL.

A loop reads and writes each element once, at memory speed; tensor operations would pass over it ten times. Sources
are given as addresses, so one call serves many master buffers without concatenating them and without a Python loop
over parameters. Everything else is flat numpy memory.

Compiled by numba without fast-math, so LLVM neither fuses a multiplication with an addition nor reorders a sum.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64


def _compiled(signature: Any) -> Any:
    """Compile now, once, for one signature; cached on disk if numba finds a writable folder."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except Exception:  # no writable folder, or a damaged cache: it is only a convenience
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return decorate


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    """An integer as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@numba.njit(inline="always", error_model="numpy")
def _run_at(address: Any, numel: Any) -> Any:
    """The fp32 elements that start at an address."""
    return numba.carray(_pointer(address), numel, F32)  # pyright: ignore


_f32, _u16 = types.float32[::1], types.uint16[::1]
_addresses, _offsets = types.int64[::1], types.int64[::1]
_table = (_addresses, _offsets, _offsets)


@numba.njit(inline="always", error_model="numpy")
def _widen(bits: Any) -> Any:
    """The fp32 value of a bf16 word."""
    return U32(U32(bits) << U32(16)).view(F32)


@numba.njit(inline="always", error_model="numpy")
def _narrow(value: Any) -> Any:
    """The bf16 word nearest to an fp32 value, ties away from zero: two operations fewer than ties to even."""
    return U16(U32(U32(F32(value).view(U32)) + U32(0x8000)) >> U32(16))


@_compiled(types.void(_f32, _u16, _f32, types.float32))
def _update_run(m: Any, c: Any, x: Any, w: Any) -> None:
    for i in range(m.size):
        d = _widen(c[i])
        step = ((x[i] - m[i]) - d) * w + d
        total = m[i] + step
        c[i] = _narrow(step - (total - m[i]))
        m[i] = total


@_compiled(types.void(_f32, _f32, types.float32))
def _update_plain_run(m: Any, x: Any, w: Any) -> None:
    for i in range(m.size):
        m[i] = m[i] + (x[i] - m[i]) * w


@_compiled(types.void(*_table, _f32, _u16, types.float64))
def update(addresses: Any, offsets: Any, numels: Any, m: Any, c: Any, w: Any) -> None:
    """`arithmetic.update_` over a table of runs, or `arithmetic.update_plain_` without compensation.

    Args:
        addresses: byte address of each run of fp32 sources.
        offsets: first element of each run in ``m`` and ``c``.
        numels: elements in each run.
        m: fp32, the lane.
        c: the bits of its bf16 compensation; empty for none.
        w: share of the sources, rounded to fp32; exactly 1 copies them.
    """
    for run in range(addresses.size):
        x = _run_at(addresses[run], numels[run])
        first, last = offsets[run], offsets[run] + numels[run]
        if w == 1.0:
            m[first:last] = x
            if c.size:
                c[first:last] = U16(0)
        elif c.size:
            _update_run(m[first:last], c[first:last], x, F32(w))
        else:
            _update_plain_run(m[first:last], x, F32(w))


@_compiled(types.boolean(*_table))
def all_finite(addresses: Any, offsets: Any, numels: Any) -> Any:
    """Whether every source element is finite and below 2**126 in size; arguments as for `update`."""
    for run in range(addresses.size):
        bits = _run_at(addresses[run], numels[run]).view(U32)
        largest = U32(0)
        for i in range(bits.size):
            largest = max(largest, U32(bits[i] & U32(0x7FFFFFFF)))
        if largest >= U32(0x7E800000):  # 2**126: differences of larger numbers could overflow
            return False
    return True


@_compiled(types.uint64(*_table))
def checksum(addresses: Any, offsets: Any, numels: Any) -> Any:
    """A sum over the bits of every source element, weighted by position; arguments as for `update`."""
    total = U64(0)
    for run in range(addresses.size):
        words = _run_at(addresses[run], numels[run]).view(U32)
        first = U64(offsets[run])
        for i in range(words.size):
            total += U64(words[i]) * U64(2 * (first + U64(i)) + U64(1))
    return total


@_compiled(types.void(types.float64[::1], types.float64, _f32, _u16))
def accumulate(total: Any, coefficient: Any, m: Any, c: Any) -> None:
    """``total <- total + coefficient * (m + c)`` in float64; an empty ``c`` means none."""
    if c.size == 0:
        for i in range(total.size):
            total[i] = total[i] + F64(m[i]) * coefficient
    else:
        for i in range(total.size):
            total[i] = total[i] + (F64(m[i]) + F64(_widen(c[i]))) * coefficient
