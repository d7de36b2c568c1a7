"""Conversion of the stored dtypes: bfloat16, float16 and float32 to float32, and float64 back, to nearest even.

Reading is exact, since every bfloat16 and float16 is a float32. Writing rounds once: float64 becomes float32 by
rounding to odd (Boldo and Melquiond 2008), after which rounding to bfloat16 gives what one rounding would have given.

Numba computes with small integers in 64 bits, which leaves vector instructions few lanes; hence the casts after each
step.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from vectors.weights import FLOATS, SIZES

MERGEABLE = (*FLOATS, "F64")  # the dtypes that can be merged; float64 is rounded to float32 when it is read
OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
_HALF_BIAS = np.float32(2.0**112)  # the ratio of the exponents' biases of float32 and float16


@intrinsic
def from_bits(_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def to_bits(_context, value):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), code


@njit(**OPTIONS)
def decode_bfloat16(raw, out):  # type: ignore[no-untyped-def]
    """bfloat16 bits `raw` (uint16) as float32 in `out`; False if one is not finite."""
    greatest = np.uint16(0)
    for i in range(raw.size):
        out[i] = from_bits(np.uint32(raw[i]) << np.uint32(16))
        greatest = max(greatest, np.uint16(raw[i] & np.uint16(0x7FFF)))
    return greatest < 0x7F80


@njit(**OPTIONS)
def subtract_bfloat16(raw, base, out):  # type: ignore[no-untyped-def]
    """decode_bfloat16 minus `base` (float32), in one loop, which stores each value once."""
    greatest = np.uint16(0)
    for i in range(raw.size):
        out[i] = from_bits(np.uint32(raw[i]) << np.uint32(16)) - base[i]
        greatest = max(greatest, np.uint16(raw[i] & np.uint16(0x7FFF)))
    return greatest < 0x7F80


@njit(**OPTIONS)
def decode_float16(raw, bits, values):  # type: ignore[no-untyped-def]
    """float16 bits `raw` (uint16) as float32 in `values`, of which `bits` is a view; False if one is not finite."""
    greatest = np.uint16(0)
    for i in range(raw.size):
        magnitude = np.uint16(raw[i] & np.uint16(0x7FFF))
        bits[i] = np.uint32(magnitude) << np.uint32(13)
        greatest = max(greatest, magnitude)
    for i in range(raw.size):
        values[i] *= _HALF_BIAS
    for i in range(raw.size):
        bits[i] |= np.uint32(raw[i] & np.uint16(0x8000)) << np.uint32(16)
    return greatest < 0x7C00


@njit(**OPTIONS)
def decode_float32(raw, values):  # type: ignore[no-untyped-def]
    """float32 `raw` copied to `values`; False if one is not finite."""
    bits, greatest = raw.view(np.uint32), np.uint32(0)
    for i in range(raw.size):
        values[i] = raw[i]
    for i in range(raw.size):
        greatest = max(greatest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return greatest < 0x7F800000


def decode(raw: np.ndarray, dtype: str, out: np.ndarray) -> bool:
    """Decode the bits `raw` of `dtype` into `out` (float32); False if a number is not finite."""
    if dtype == "BF16":
        return bool(decode_bfloat16(raw, out))
    if dtype == "F16":
        return bool(decode_float16(raw, out.view(np.uint32), out))
    if dtype == "F64":
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is reported as not finite
            out[:] = raw
        return bool(np.isfinite(out).all())
    return bool(decode_float32(raw, out))


@njit(**OPTIONS)
def encode_bfloat16(values, out):  # type: ignore[no-untyped-def]
    """float64 `values` rounded to bfloat16 bits in `out` (uint16), to nearest even; False on overflow or NaN."""
    greatest = np.uint32(0)
    for i in range(values.size):
        value = values[i]
        nearest = np.float32(value)
        widened = np.float64(nearest)
        inexact = np.uint32(widened != value)
        too_large = np.uint32(abs(widened) > abs(value))
        rounded_to_odd = np.uint32(to_bits(nearest) - np.uint32(inexact & too_large)) | inexact
        last_bit = np.uint32(rounded_to_odd >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(rounded_to_odd + np.uint32(0x7FFF) + np.uint32(last_bit)) >> np.uint32(16)
        out[i] = np.uint16(rounded)
        greatest = max(greatest, np.uint32(rounded & np.uint32(0x7FFF)))
    return greatest < 0x7F80


@njit(**OPTIONS)
def encode_float32(values, bits, out):  # type: ignore[no-untyped-def]
    """float64 `values` rounded to float32 in `out`, of which `bits` is a view; False on overflow or NaN."""
    greatest = np.uint32(0)
    for i in range(values.size):
        out[i] = np.float32(values[i])
    for i in range(values.size):
        greatest = max(greatest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return greatest < 0x7F800000


def encode(values: np.ndarray, dtype: str, out: np.ndarray) -> bool:
    """Round `values` (float64) to `dtype` into `out` (of `storage(dtype)`); False if one overflows or is NaN."""
    if dtype == "BF16":
        return bool(encode_bfloat16(values, out))
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            half = values.astype(np.float16)
        out[:] = half.view(np.uint16)
        return bool(np.isfinite(half).all())
    return bool(encode_float32(values, out.view(np.uint32), out))


def storage(dtype: str) -> np.dtype:
    """The NumPy dtype that holds the bits of `dtype`."""
    return np.dtype(np.float32 if dtype == "F32" else np.uint16)


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The decoded numbers of a whole tensor, float32."""
    out = np.empty(raw.size, np.float32)
    decode(raw, dtype, out)
    return out


def size(dtype: str) -> int:
    """Bytes of one element."""
    return SIZES[dtype]
