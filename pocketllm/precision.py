"""Precision of torch's matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import kernels


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


@contextmanager
def bfloat16_linears(layer: nn.Module) -> Iterator[None]:
    """Within it, the linears of a decoder layer multiply in bfloat16; what goes in and out of them
    stays float32.

    Where :func:`bfloat16_factors` lets torch do the same it converts the weights in every call. On
    processors without tiles (AMX) products in bfloat16 are no faster, and nothing changes.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or matmul.fp32_precision != "bf16" or "amx" not in kernels.available_isas():
        yield
        return
    linears = [m for m in layer.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    kept = [linear.weight.data for linear in linears]
    try:
        for linear in linears:
            linear.weight.data = linear.weight.data.bfloat16()
            linear.forward = _in_bfloat16(linear)
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
            vars(linear).pop("forward", None)


def _in_bfloat16(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(x.bfloat16(), linear.weight).float()
        return product if linear.bias is None else product + linear.bias

    return forward
