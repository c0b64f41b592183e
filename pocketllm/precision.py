"""Precision of torch's matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Lets torch round the factors of float32 products to bfloat16 where the processor multiplies
    these faster; sums stay float32.

    For products with the activations of a model, which is what calibrating takes most of its time
    for: checkpoints are bfloat16 themselves, and the error of a product, 0.2 %, is far below what
    compressed weights bring. And for figures that are only shown. Not for choices under second
    moments: a small error there is a sum of large terms that nearly cancel.

    ``torch.backends.mkldnn.matmul.fp32_precision`` (from torch 2.9 on), where a program has set it,
    decides instead.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or matmul.fp32_precision != "none":
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"
