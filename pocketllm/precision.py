"""Precision of torch's matrix products, and units in which squares are float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import kernels

# Units are halved or doubled so often at most, so that they and their inverses are float32.
MOST_DOUBLINGS = 120


def power_of_two(largest: float) -> float:
    """A unit for values up to ``largest``, whose own squares may be beyond float32, or below it.

    In this unit all digits stay as they are.
    """
    return 2.0 ** max(-MOST_DOUBLINGS, min(math.frexp(largest)[1], MOST_DOUBLINGS))


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
    if _precision() != "none":
        yield
        return
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def _precision() -> str | None:
    """How torch may round the factors of float32 products; None where it cannot be told."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return None if matmul is None else str(matmul.fp32_precision)


def factor_dtype() -> torch.dtype:
    """What factors of large products are kept in.

    bfloat16 where :func:`bfloat16_factors` lets torch round to it and the processor has tiles
    (AMX), since torch would convert float32 in every call. On other processors products in bfloat16
    are no faster.
    """
    tiles = _precision() == "bf16" and "amx" in kernels.available_isas()
    return torch.bfloat16 if tiles else torch.float32


def linear_dtype(module: nn.Module) -> torch.dtype:
    """What the weight of a module of a decoder layer is held in while the layer runs.

    :func:`factor_dtype` for linears, but for one with a forward of its own, which may not convert
    what goes in.
    """
    plain = type(module) is nn.Linear and "forward" not in vars(module)
    return factor_dtype() if plain else torch.float32


@contextmanager
def bfloat16_linears(layer: nn.Module) -> Iterator[None]:
    """Within it, linears whose weight is bfloat16 take and give float32; what they give has been
    rounded to bfloat16."""
    linears = [m for m in layer.modules() if linear_dtype(m) == torch.bfloat16]
    for linear in linears:
        linear.forward = _in_bfloat16(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _in_bfloat16(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(x.bfloat16(), linear.weight).float()
        return product if linear.bias is None else product + linear.bias

    return forward
