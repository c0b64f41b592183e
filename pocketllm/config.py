"""What a compression is asked to do: one dataclass, its checks, and the published presets."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any, ClassVar

from .errors import PocketError

PREFERENCES = ("quality", "speed")
NORMS = ("input", "ln", "rln")
SHARES = ("auto", "tensor", "type", "model")
TABLE_DTYPES = ("auto", "int8", "float16")
CODEBOOK_INITS = ("kmeans", "normal", "uniform")
CODECS = ("auto", "trellis", "codebook")
# Settings of codebooks: trellis codes go with their defaults only.
_AGAINST_TRELLIS = (
    "subvector", "codebook", "prefer", "norm", "table_dtype", "share", "codebook_init", "hidden",
    "epochs", "batch", "row_scale",
)  # fmt: skip
MAX_SUBVECTOR = 16
MAX_CODEBOOK = 65536

# Published settings (arXiv 2511.17637): RLN inside, h = 16, lambda = 0.5; the ratio in the name is
# the paper's own, against fp32. RLN inside takes a row's mean and magnitude away; both are kept, in
# a byte each (docs/METHOD.md says why).
_PUBLISHED = {"batch": 16384, "norm": "rln", "table_dtype": "float16", "row_shift": True}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-8x": {"subvector": 4, "codebook": 32768, **_PUBLISHED},
    "paper-10x": {"subvector": 4, "codebook": 4096, **_PUBLISHED},
    "paper-16x": {"subvector": 8, "codebook": 32768, **_PUBLISHED},
}


@dataclasses.dataclass
class PocketConfig:
    """Settings of one compression.

    Size: give one of ``bits`` (bits per weight of the compressed tensors, everything included),
    ``target_size`` (bytes of all weight files), or ``subvector`` with ``codebook`` (an exact
    shape). With none of them, ``bits=3``.

    Attributes:
        bits: target bits per weight over the compressed tensors, codecs and scales included.
        target_size: target size of all weight files in bytes.
        subvector: d, values per sub-vector, 1 to 16.
        codebook: K, codewords, 2 to 65536.
        codec: what ``bits`` and ``target_size`` choose from: ``"trellis"`` codes (of 1 to 6 bits,
            and codebooks for fewer and more), ``"codebook"`` shapes, or ``"auto"``: trellis codes
            unless another setting asks for codebooks.
        prefer: what ``bits`` and ``target_size`` spend on: ``"quality"``, or ``"speed"``: of the
            codebook shapes only those small enough to be looked up in registers, some of them as
            magnitudes with all their signs. With ``subvector`` and ``codebook`` the latter alone.
        hidden: h, width of the codec's hidden layer (paper: 16).
        norm: ``"input"`` (RLN at the input, decoder folds to a table), ``"ln"`` (layer norm over
            the sub-vector, folds too) or ``"rln"`` (RLN inside, the published form).
        share: which tensors share one codec: ``"tensor"``, ``"type"`` (same role in every layer),
            ``"model"``, or ``"auto"`` (by type when the codec stays a small part of the indices'
            bits, by model otherwise).
        table_dtype: storage of the folded table, ``"int8"`` or ``"float16"``; ``"auto"`` is int8.
            A codebook that needs its decoder is float16.
        row_scale: keep one scale a row.
        row_shift: keep the row's mean as well as its scale. Without both (and with ``norm="rln"``)
            the codec is the published form to the letter; see docs/METHOD.md for what that costs.
        epochs: passes over the training sub-vectors; None picks by size.
        learning_rate: Adam's, multiplied by 0.1 at 30 % and 60 % and 90 % of the epochs.
        batch: sub-vectors a training step; None picks by codebook, 4,096 to 16,384.
        codebook_loss: lambda, weight of the codebook term.
        codebook_init: ``"kmeans"``, ``"normal"`` or ``"uniform"``.
        calibration: text file whose activations weight the error; None = plain reconstruction.
        calibration_windows: windows of 512 tokens taken from it.
        feedback: error feedback along the row (needs calibration).
        embeddings: compress embeddings and head too.
        modules_to_not_convert: modules that stay dense: whole names, last parts of names
            (``k_proj``) or the first parts of several (``model.layers.0``).
        workers: threads; None = all. The result does not depend on it.
        seed: seeds every random choice.
    """

    # What transformers asks of a quantization_config that is given to from_pretrained.
    quant_method: ClassVar[str] = "pocketllm"

    bits: float | None = None
    target_size: int | None = None
    subvector: int | None = None
    codebook: int | None = None
    codec: str = "auto"
    prefer: str = "quality"
    hidden: int = 16
    norm: str = "input"
    share: str = "auto"
    table_dtype: str = "auto"
    row_scale: bool = True
    row_shift: bool = False
    epochs: int | None = None
    learning_rate: float = 1.6e-2
    batch: int | None = None
    codebook_loss: float = 0.5
    codebook_init: str = "kmeans"
    calibration: str | None = None
    calibration_windows: int = 128
    feedback: bool = True
    embeddings: bool = False
    modules_to_not_convert: list[str] = dataclasses.field(default_factory=list)
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_size()
        for name, choices in (
            ("codec", CODECS),
            ("prefer", PREFERENCES),
            ("norm", NORMS),
            ("share", SHARES),
            ("table_dtype", TABLE_DTYPES),
            ("codebook_init", CODEBOOK_INITS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise PocketError(f"{name}: got {value!r}, want one of {', '.join(choices)}")
        for name in ("hidden", "calibration_windows"):
            _check_integer(name, getattr(self, name), 1, None)
        _check_integer("hidden", self.hidden, 1, 64)
        for name in ("epochs", "batch", "workers"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1, None)
        _check_integer("seed", self.seed, 0, 2**32 - 1)
        for name in ("learning_rate", "codebook_loss"):
            _check_positive(name, getattr(self, name))
        if self.norm == "rln" and self.table_dtype == "int8":
            raise PocketError(
                'table_dtype: "int8" needs a foldable norm ("input" or "ln"), got norm "rln"'
            )
        if self.codec == "trellis" and self._against_trellis:
            name, value = next(iter(self._against_trellis.items()))
            raise PocketError(
                f'codec: "trellis" does not go with {name} = {value!r}: leave that out, or take'
                ' codec "codebook"'
            )
        if not self.row_scale and self.row_shift:
            raise PocketError("row_shift: needs row_scale=True")

    @property
    def _against_trellis(self) -> dict[str, Any]:
        """Settings of codebooks that are not the defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: getattr(self, name)
            for name in _AGAINST_TRELLIS
            if getattr(self, name) != defaults[name]
        }

    @property
    def has_trellis(self) -> bool:
        """Are sizes met with trellis codes?"""
        return self.codec != "codebook" and not self._against_trellis

    def _check_size(self) -> None:
        if self.bits is not None:
            _check_positive("bits", self.bits)
            if not 0.1 <= self.bits <= 16:
                raise PocketError(f"bits: got {self.bits}, want 0.1 to 16 bits per weight")
        if self.target_size is not None:
            _check_integer("target_size", self.target_size, 1, None)
        if (self.subvector is None) != (self.codebook is None):
            raise PocketError("subvector and codebook: give both or neither")
        given = [n for n in ("bits", "target_size", "codebook") if getattr(self, n) is not None]
        if len(given) > 1:
            raise PocketError(f"{' and '.join(given)}: these exclude each other, give one")
        if self.subvector is not None:
            _check_integer("subvector", self.subvector, 1, MAX_SUBVECTOR)
            _check_integer("codebook", self.codebook, 2, MAX_CODEBOOK)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PocketConfig:
        """The published settings ``paper-8x``, ``paper-10x`` or ``paper-16x``, with overrides.

        Raises:
            PocketError: unknown name.
        """
        if name not in PRESETS:
            raise PocketError(f"preset: got {name!r}, want one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PocketConfig:
        """Build from a plain dictionary; an unknown key is an error that names it."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise PocketError(
                f"config: unknown setting {unknown[0]!r}, known are {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PocketConfig:
        """Read a JSON file of settings."""
        try:
            with open(path, encoding="utf-8") as handle:
                values = json.load(handle)
        except OSError as error:
            raise PocketError(
                f"config: cannot read {os.fspath(path)!r}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise PocketError(f"config: {os.fspath(path)!r} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise PocketError(
                f"config: {os.fspath(path)!r} holds {type(values).__name__}, want an object"
            )
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        raise PocketError(f"{name}: got {value!r}, want {wanted}")


def _check_positive(name: str, value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (value > 0 and math.isfinite(value))
    ):
        raise PocketError(f"{name}: got {value!r}, want a positive number")
