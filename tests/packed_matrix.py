"""What tests of every kind of packed matrix do with one: with the kernels, and their twins."""

from __future__ import annotations

from typing import Any

from pocketllm import kernels, reference
from pocketllm.kernels import AnyView


class PackedMatrix:
    """A packed matrix (out_features, in_features) with all that a product takes."""

    out_features: int
    in_features: int
    packed: Any
    codec: AnyView
    scale: Any
    shift: Any
    bias: Any

    def rows(self, first: int, count: int) -> Any:
        """kernels.decode_rows of these rows."""
        return kernels.decode_rows(
            self.packed, self.in_features, first, count, self.codec, self.scale, self.shift
        )

    def twin(self) -> Any:
        """The whole matrix in float64."""
        return reference.decode_rows(
            self.packed, self.in_features, 0, self.out_features, self.codec, self.scale, self.shift
        )

    def product(self, x: Any, activations: str = "float32") -> Any:
        """kernels.matmul with x."""
        return kernels.matmul(
            x, self.packed, self.out_features, self.codec, self.scale, self.shift, self.bias,
            activations=activations,
        )  # fmt: skip
