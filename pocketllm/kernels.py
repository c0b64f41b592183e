"""The C kernels on NumPy arrays. The only module that imports the extension.

Arrays are float32 unless said otherwise. Strided arrays are accepted (they are copied); another dtype
or shape is refused with a sentence like ``z: got float64 (3, 7), want float32 (n, 8)`` (TypeError for
the dtype, ValueError for the shape). The GIL is released while a kernel runs. The number of threads is
torch's when torch is imported, else OpenMP's; no result depends on it, nor on the instruction set.
Every function has a plain NumPy twin of the same name in :mod:`pocketllm.reference`.
"""

from __future__ import annotations

import sys
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from pocketllm import _kernels

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]


def _threads() -> int:
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    return threads or _kernels.default_threads()


# ---- instruction set --------------------------------------------------------------------------


def isa() -> str:
    """Name of the instruction set in use: ``scalar``, ``avx2``, ``avx512`` or ``neon``."""
    return _kernels.isa()


def available_isas() -> list[str]:
    """Names of the instruction sets that this build has and this machine runs, best last."""
    return _kernels.available_isas()


def set_isa(name: str) -> None:
    """Use the named instruction set from now on, in the whole process.

    The environment variable POCKETLLM_ISA does the same at import.

    Raises:
        ValueError: this machine or build does not have it.
    """
    _kernels.set_isa(name)


def show_config() -> str:
    """One line on the kernels in use: instruction set, threads, compiler."""
    compiler, lanes = _kernels.build_info()
    return (
        f"kernels: {isa()} ({lanes} float lanes) of {', '.join(available_isas())}; "
        f"threads: {_threads()}; compiler: {compiler}"
    )


# ---- search and packing -----------------------------------------------------------------------


@overload
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: Literal[False] = False,
) -> Ints: ...
@overload
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: Literal[True],
) -> tuple[Ints, Floats]: ...
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: bool = False,
) -> Ints | tuple[Ints, Floats]:
    """Index of the codeword with the smallest ``sum_j weight[j] (z[j] - c[j])**2 + bias``.

    Exact search in float32, lowest index on ties. Distances are compared as
    ``(|c|**2 + bias) / 2 - z.c``: two codewords closer to each other in distance than the rounding of
    ``|z| |c|`` may swap. A row of z with NaN or Inf in it gets some index in range; so does every row
    when the codebook holds them.

    Args:
        z: (n, d) queries, d in 1..16.
        codebook: (K, d) codewords, K in 1..65536.
        weight: (d,) weight of each dimension, default 1.
        bias: (K,) added to the distance of each codeword, default 0.
        return_error: also return that smallest sum, computed from the differences.

    Returns:
        int32 (n,), and float32 (n,) with ``return_error``.
    """
    index, error = _kernels.nearest(z, codebook, weight, bias, return_error, _threads())
    return (index, error) if return_error else index


# ---- inference --------------------------------------------------------------------------------


# ---- training ---------------------------------------------------------------------------------


# ---- encoding with error feedback -------------------------------------------------------------
