"""Row scales and shifts in eight bits.

A matrix's scales (or shifts) are out + 1 bytes: e, then a byte c for every row. A scale is 0 for
c = 0 and else 2^(e - 127 + floor(c / 16)) (1 + (c mod 16) / 16): a float without sign, with four
bits of exponent and four of mantissa. A shift has its sign in the highest bit of c and three bits
of exponent. In the bits of a float32 that is (16 e + c) << 19, exact everywhere.
"""

from __future__ import annotations

import numpy as np

# Bits of a float32's mantissa that are dropped.
_DROPPED = 19
# Largest base exponent: the largest code must be a finite float32.
MAX_SCALE_BASE = 254 - 15
MAX_SHIFT_BASE = 254 - 7


def encode(values: np.ndarray, *, signed: bool) -> np.ndarray:
    """Bytes (out + 1,) uint8 for ``values`` (out,): each the nearest that can be stored.

    ``signed`` is for shifts. A positive scale is never stored as 0; a shift below 2^-7 of the
    largest is.
    """
    values = np.asarray(values, np.float32)
    levels = 128 if signed else 256
    bits = np.abs(values).view(np.uint32).astype(np.int64)
    # Nearest, ties to even: 16 times the float32's exponent field plus the mantissa's first bits.
    key = (bits + (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)) >> _DROPPED
    highest = int(key.max(initial=0)) // 16 - (levels // 16 - 1)
    base = min(max(highest, 1), MAX_SHIFT_BASE if signed else MAX_SCALE_BASE)
    code = np.minimum(key - 16 * base, levels - 1)
    if signed:
        code = np.where(code < 1, 0, code | (np.signbit(values) << 7))
    else:
        code = np.where(values > 0, np.maximum(code, 1), 0)
    return np.concatenate([[base], code]).astype(np.uint8)


def decode(stored: np.ndarray, *, signed: bool) -> np.ndarray:
    """Float32 (out,) of what :func:`encode` made, or of float16 values (out,) as they are."""
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    code = stored[1:].astype(np.uint32)
    size = code & 127 if signed else code
    bits = np.where(size == 0, 0, (16 * np.uint32(stored[0]) + size) << _DROPPED)
    sign = (code >> 7) << 31 if signed else np.uint32(0)
    return (bits.astype(np.uint32) | sign).astype(np.uint32).view(np.float32)


def nearest(values: np.ndarray, *, signed: bool) -> np.ndarray:
    """Float32 (out,): ``values`` as they come back from storage."""
    return decode(encode(values, signed=signed), signed=signed)


def in_range(stored: np.ndarray, *, signed: bool) -> bool:
    """Whether every number that these bytes can hold is finite and normal."""
    return 1 <= int(stored[0]) <= (MAX_SHIFT_BASE if signed else MAX_SCALE_BASE)
