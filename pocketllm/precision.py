"""Precision of torch's matrix products, and units in which squares are float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

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
def rounded_factors() -> Iterator[None]:
    """Lets the factors of float32 products be rounded where the processor multiplies these faster:
    to bfloat16 in torch's products, and to what :func:`factor_dtype` says in ours.

    For products with the activations of a model, which is what calibrating takes most of its time
    for: checkpoints are bfloat16 themselves, and the error of a product, 0.2 % in bfloat16, is far
    below what compressed weights bring. And for figures that are only shown. Not for choices under
    second moments: a small error there is a sum of large terms that nearly cancel.

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
    """What factors of large products become where :func:`rounded_factors` allows it.

    bfloat16 where the processor has tiles for it (AMX); int16, with a scale for each 256 values
    (:func:`pocketllm.kernels.rounded_linear`), on x86 without them, where that takes two thirds of
    the time of float32 or less; else float32.
    """
    if _precision() != "bf16":
        return torch.float32
    if "amx" in kernels.available_isas():
        return torch.bfloat16
    return torch.int16 if kernels.isa() in ("avx2", "avx512") else torch.float32


def kept_dtype() -> torch.dtype:
    """What these factors are kept in: our kernels read float32, and torch would convert that to
    bfloat16 in every call."""
    return torch.bfloat16 if factor_dtype() == torch.bfloat16 else torch.float32


def linear_dtype(module: nn.Module) -> torch.dtype:
    """What the weight of a module of a decoder layer is held in while the layer runs."""
    return kept_dtype() if _is_plain(module) else torch.float32


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear without a forward of its own, which may not convert what goes in."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def rounded_linears(layer: nn.Module) -> Iterator[None]:
    """Within it, linears multiply what :func:`factor_dtype` says, and take and give float32.

    Where that is bfloat16, their weight has to be, and what they give has been rounded to it; where
    it is int16, gradients are still made with float32.
    """
    way = {torch.bfloat16: _in_bfloat16, torch.int16: _in_int16}.get(factor_dtype())
    linears = []
    if way is not None:
        linears = [m for m in layer.modules() if _is_plain(m)]
        for linear in linears:
            linear.forward = way(linear)
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


def _in_int16(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return nn.functional.linear(x, linear.weight, linear.bias)
        weight = linear.weight.detach().numpy()
        rows = x.float().reshape(-1, x.shape[-1]).numpy()
        product = torch.from_numpy(kernels.rounded_linear(rows, weight))
        product = product.view(*x.shape[:-1], len(weight))
        return product if linear.bias is None else product.add_(linear.bias)

    return forward
