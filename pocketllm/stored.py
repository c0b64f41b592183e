"""A codec as the file stores it: trained, folded where it can be, and rounded to its stored form.

What is rounded here is what encoding searches, so that the reader decodes exactly what was chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .allocate import Shape, is_symmetric
from .codec import DEFAULT_UPDATES, Codec, refine_table, train_codec
from .config import PocketConfig
from .kernels import CodecView
from .schema import CodecSpec

REFINE_ITERATIONS = 12
# Sub-vectors of a training step. A table that starts at k-means and ends with Lloyd's iterations is
# as good after fewer epochs of smaller steps between them (docs/METHOD.md).
BATCH = 16384
SHORT_BATCH, BATCH_PER_CODEWORD = 4096, 4
SHORT_EPOCHS = 4
INT8_MAX = 127
# The most in tables of so many values with all signs, which saves a tenth of a token's time: four
# products of such a value and a byte fit int16 (csrc/infer_rows_avx2.h).
SMALL_MAX, SMALL_SUBVECTOR = 64, 4
# Correlations and means (in standard deviations) up to here cost a symmetric table 0.002 bits.
SIGNS_RANDOM = 0.05


@dataclasses.dataclass(frozen=True)
class StoredCodec:
    """A codec in its stored form.

    Attributes:
        spec: its description.
        parts: tensors of the file (see :class:`pocketllm.schema.CodecSpec`).
        encoder: flat float32 parameters, for codecs that are not folded; never stored in the file.
        warnings: sentences for the user.
    """

    spec: CodecSpec
    parts: dict[str, np.ndarray]
    encoder: np.ndarray | None = None
    warnings: Sequence[str] = ()

    @property
    def table(self) -> np.ndarray:
        """(K, d) float32: the folded table, or the codebook of a codec with a decoder."""
        if "table_scale" in self.parts:
            return self.parts["table"].astype(np.float32) * self.parts["table_scale"]
        return self.parts["table" if "table" in self.parts else "codebook"].astype(np.float32)

    @property
    def codec(self) -> Codec:
        """The codec of a decoder that is not folded, in its stored precision."""
        assert self.encoder is not None
        return Codec(
            self.spec.subvector,
            self.spec.hidden,
            self.spec.norm,
            self.encoder,
            self.parts["decoder"].astype(np.float32),
            self.table,
        )

    @property
    def view(self) -> CodecView:
        """What the decoding kernels take."""
        from .checkpoint import codec_view

        return codec_view(self.spec, self.parts)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it."""
        return self.parts if self.encoder is None else {**self.parts, "encoder": self.encoder}

    @classmethod
    def from_arrays(cls, spec: CodecSpec, arrays: dict[str, np.ndarray]) -> StoredCodec:
        """Restore what ``arrays`` returned."""
        parts = {name: array for name, array in arrays.items() if name != "encoder"}
        return cls(spec, parts, arrays.get("encoder"))


def train_stored_codec(
    groups: Sequence[np.ndarray],
    spec: CodecSpec,
    config: PocketConfig,
    progress: Callable[[float, str], None] | None = None,
) -> StoredCodec:
    """Train a codec on normalised rows and bring it into its stored form.

    A table that is symmetric (:func:`pocketllm.allocate.is_symmetric`) is trained on magnitudes.

    Args:
        groups: matrices of normalised rows (R, L*d) float32, one for each row length.
        spec: what is to be stored.
        config: training settings.
        progress: called with the share of the work done and what is being done.

    Raises:
        PocketError: fewer sub-vectors than codewords.
    """
    foldable = spec.storage != "decoder"
    if foldable:
        groups = [_recut(groups, spec.subvector)]
    symmetric = (
        spec.storage == "table-int8"
        and is_symmetric(config.prefer, Shape(spec.subvector, spec.codebook))
        and _signs_are_random(groups[0].reshape(-1, spec.subvector))
    )
    if symmetric:
        groups = [np.abs(groups[0])]
    codewords = spec.codebook >> (spec.subvector if symmetric else 0)
    result = train_codec(
        groups,
        subvector=spec.subvector,
        codewords=codewords,
        hidden=spec.hidden,
        norm=spec.norm,
        init=config.codebook_init,
        **_training_length(config, spec, codewords, sum(rows.size for rows in groups)),
        lr=config.learning_rate,
        codebook_loss=config.codebook_loss,
        seed=config.seed,
        progress=progress,
    )
    codec = result.codec
    if not foldable:
        parts = {
            "codebook": codec.codebook.astype(np.float16),
            "decoder": codec.decoder.astype(np.float16),
        }
        return StoredCodec(spec, parts, codec.encoder, result.warnings)
    table = refine_table(
        codec.fold(),
        groups[0],
        iterations=REFINE_ITERATIONS,
        seed=config.seed,
    )
    if symmetric:
        table = with_signs(np.maximum(table, 0))
    most = largest_value(spec.subvector, symmetric)
    return StoredCodec(spec, round_table(table, spec.storage, most), None, result.warnings)


def _signs_are_random(x: np.ndarray) -> bool:
    """Do magnitudes (n, d) say nothing about signs, by means and correlations?"""
    deviation = x.std(0, dtype=np.float64)
    if not deviation.all():
        return False
    mean = np.abs(x.mean(0, dtype=np.float64)) / deviation
    correlation = np.abs(np.atleast_2d(np.corrcoef(x, rowvar=False)) - np.eye(x.shape[1]))
    return max(float(mean.max()), float(correlation.max())) < SIGNS_RANDOM


def with_signs(magnitudes: np.ndarray) -> np.ndarray:
    """Table (2^d n, d) of magnitudes (n, d) with all combinations of signs.

    Bit j above those of the magnitudes' own index is set where value j is negative.
    """
    n, d = magnitudes.shape
    signs = 1 - 2 * (np.arange(2**d)[:, None] >> np.arange(d) & 1).astype(magnitudes.dtype)
    return (signs[:, None] * magnitudes).reshape(2**d * n, d)


def largest_value(d: int, symmetric: bool) -> int:
    """What the largest magnitude of an int8 table becomes."""
    return SMALL_MAX if symmetric and d == SMALL_SUBVECTOR else INT8_MAX


def _training_length(
    config: PocketConfig, spec: CodecSpec, codewords: int, values: int
) -> dict[str, Any]:
    """``epochs`` and ``batch`` of :func:`train_codec` for so many values, where not given."""
    if spec.storage == "decoder" or config.codebook_init != "kmeans":
        return {"epochs": config.epochs, "batch": config.batch or BATCH}
    batch = config.batch or min(BATCH, max(SHORT_BATCH, BATCH_PER_CODEWORD * codewords))
    updates = -(-values // (spec.subvector * batch))
    epochs = config.epochs or max(SHORT_EPOCHS, -(-DEFAULT_UPDATES["kmeans"] // updates))
    return {"epochs": epochs, "batch": batch}


def round_table(table: np.ndarray, storage: str, most: int = INT8_MAX) -> dict[str, np.ndarray]:
    """A float32 table (K, d) as the tensors of ``"table-int8"`` or ``"table-float16"``.

    Args:
        table: the values.
        storage: of the two.
        most: int8: what the largest magnitude becomes.
    """
    if storage == "table-float16":
        return {"table": table.astype(np.float16)}
    largest = float(np.abs(table).max())
    scale = np.float32(largest / most if largest > 0 else 1.0)
    return {
        "table": np.rint(table / scale).astype(np.int8),
        "table_scale": np.array([scale], np.float32),
    }


def _recut(groups: Sequence[np.ndarray], subvector: int) -> np.ndarray:
    """All sub-vectors as rows of one length: without RLN inside, rows mean nothing as such."""
    length = math.gcd(*(rows.shape[1] // subvector for rows in groups)) * subvector
    return np.concatenate([rows.reshape(-1, length) for rows in groups])
