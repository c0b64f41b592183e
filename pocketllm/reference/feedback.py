"""Encoding with error feedback."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def encode_feedback(
    x: NDArray[np.float32],
    table: NDArray[np.float32],
    metric: NDArray[np.float32],
    feedback: NDArray[np.float32],
    previous: NDArray[np.int32] | None = None,
    sweeps: int = 1,
) -> NDArray[np.int32]:
    """Twin of :func:`pocketllm.kernels.encode_feedback`, in float64."""
    rows, d = len(x), table.shape[1]
    entries = table.astype(np.float64)
    error = np.zeros(x.shape)
    if previous is not None:
        error = x - entries[previous].reshape(x.shape)
    index = np.zeros((rows, len(metric)), np.int32)
    for sweep in range(sweeps):
        places = range(len(metric))
        for place in reversed(places) if sweep % 2 else places:
            here = slice(place * d, place * d + d)
            others = feedback[:, here].astype(np.float64)
            others[here] = 0.0
            if previous is None:
                others[place * d :] = 0.0
            gap = (x[:, here] + error @ others)[:, None] - entries
            scores = np.einsum("rka,ab,rkb->rk", gap, metric[place].astype(np.float64), gap)
            index[:, place] = scores.argmin(1)
            error[:, here] = x[:, here] - entries[index[:, place]]
    return index
