"""How a model becomes matrices and a matrix becomes sub-vectors: the only owner of that layout.

A weight W is (out, in), one output unit a row. A row is cut into L = ceil(in / d) sub-vectors of
length d, the last padded with zeros. Rows are normalised before a codec sees them (reshaped layer
normalisation at the input: statistics over the whole row, arXiv 2511.17637 section 3).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from . import rowcode
from .errors import PocketError

if TYPE_CHECKING:
    from torch import nn

# Below float32's smallest normal number a row is zero for every purpose.
TINY = 2.0**-126
# Values whose squares are in memory together.
SQUARED_TOGETHER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Target:
    """One matrix of a model that is to be compressed.

    Attributes:
        name: module name, as in the state dict without ``.weight``.
        kind: ``"linear"``, ``"conv1d"`` (stored transposed), ``"embedding"`` or ``"tied"``
            (a head that reads the embedding's matrix and owns nothing).
        shape: (out, in) as rows and columns of the matrix that is cut into sub-vectors.
        role: the name with layer numbers removed, equal for the same weight type of every layer.
        tied_to: for ``"tied"``, the name of the target that owns the matrix.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    role: str
    tied_to: str | None = None

    @property
    def weights(self) -> int:
        """Number of weights the target owns."""
        return 0 if self.tied_to else self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class Dense:
    """A parameter that stays as it is, and why."""

    name: str
    weights: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """A matrix as normalised rows.

    Attributes:
        values: (out, L*d) float32, ``(W - shift) / scale`` with zeros as padding.
        scale: (out,) float32, as eight bits store it (:mod:`pocketllm.rowcode`).
        shift: (out,) float32, the same, or None.
    """

    values: np.ndarray
    scale: np.ndarray
    shift: np.ndarray | None


def subvector_count(columns: int, subvector: int) -> int:
    """L, the sub-vectors a row of ``columns`` values is cut into."""
    return -(-columns // subvector)


def role_of(name: str) -> str:
    """The name without layer numbers: ``layers.3.mlp.up_proj`` -> ``layers.mlp.up_proj``."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


@contextmanager
def naming(target: Target) -> Iterator[None]:
    """Put the target's name before what is wrong with its weight."""
    try:
        yield
    except PocketError as error:
        raise PocketError(f"{target.name}: {error}") from error


def normalise(
    weight: np.ndarray, subvector: int, *, row_scale: bool = True, row_shift: bool = False
) -> Rows:
    """Cut a matrix into sub-vectors and normalise its rows.

    Args:
        weight: (out, in) float32.
        subvector: d.
        row_scale: divide by the row's root mean square (standard deviation with ``row_shift``).
        row_shift: subtract the row's mean first.

    Scale and shift are rounded to their stored eight bits before they are applied, so that what is
    stored is what was used. A row that is zero after the shift gets scale 0.

    Raises:
        PocketError: NaN or Inf in the weight.
    """
    statistics = row_statistics(lambda: [weight], row_scale=row_scale, row_shift=row_shift)
    return cut(weight, subvector, *statistics)


def row_statistics(
    parts: Callable[[], Iterable[np.ndarray]], *, row_scale: bool = True, row_shift: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale (out,) and shift (out,), or None, of a matrix as eight bits store them.

    Args:
        parts: gives the matrix in parts of whole rows, float32, each time it is called.
        row_scale, row_shift: as for :func:`normalise`.

    Raises:
        PocketError: NaN or Inf in the weight.
    """
    shift = None
    if row_shift:
        means = [part.mean(1, dtype=np.float64) for part in _finite(parts())]
        shift = rowcode.nearest(np.concatenate(means), signed=True)
    if not row_scale:
        return np.ones(sum(len(part) for part in _finite(parts())), np.float32), shift
    spreads, first = [], 0
    for part in _finite(parts()):
        if shift is not None:
            part = part - shift[first : first + len(part), None]
            first += len(part)
        spreads.append(np.sqrt(_mean_square(part)))
    spread = np.concatenate(spreads)
    return rowcode.nearest(np.where(spread < TINY, 0.0, spread), signed=False), shift


def cut(
    weight: np.ndarray, subvector: int, scale: np.ndarray, shift: np.ndarray | None = None
) -> Rows:
    """Rows (R, in) float32 with this scale (R,) and shift (R,), as :class:`Rows`.

    A row with scale 0 becomes zero.
    """
    rows, columns = weight.shape
    values = np.zeros((rows, subvector_count(columns, subvector) * subvector), np.float32)
    body = values[:, :columns]
    body[...] = weight
    if shift is not None:
        body -= shift[:, None]
    zero = scale == 0
    body /= np.where(zero, np.float32(1.0), scale)[:, None]
    body[zero] = 0.0
    return Rows(values, scale, shift)


def _finite(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        finite = np.isfinite(part)
        if not finite.all():
            raise PocketError(f"weight: {np.sum(~finite)} of {part.size} values are NaN or Inf")
        yield part


def _mean_square(rows: np.ndarray) -> np.ndarray:
    """Mean of the squares of each row, float64, 0 of an empty one."""
    if not rows.shape[1]:
        return np.zeros(len(rows))
    step = max(1, SQUARED_TOGETHER // rows.shape[1])
    parts = [
        np.square(rows[first : first + step], dtype=np.float64).mean(1)
        for first in range(0, len(rows), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def denormalise(
    values: np.ndarray, columns: int, scale: np.ndarray, shift: np.ndarray | None
) -> np.ndarray:
    """The matrix (out, in) float32 that normalised rows (out, L*d) stand for."""
    weight = values[:, :columns] * scale[:, None]
    if shift is not None:
        weight += shift[:, None]
    return weight


def matrix_of(module: nn.Module, kind: str) -> np.ndarray:
    """The module's weight as a float32 (out, in) array; a Conv1D's is transposed."""
    weight = module.weight.detach().float().cpu().numpy()
    return np.ascontiguousarray(weight.T) if kind == "conv1d" else weight


def walk(
    model: nn.Module, *, embeddings: bool, skip: Iterable[str] = ()
) -> tuple[list[Target], list[Dense]]:
    """What of a causal LM is compressed, in module order, and which large parameters are not.

    Args:
        model: a transformers causal LM (anything with ``get_input_embeddings`` and
            ``get_output_embeddings``).
        embeddings: include the input embedding and the head.
        skip: names to leave dense; a name matches as a whole module name or a suffix after a dot,
            and a dotted prefix matches everything below it.

    Returns:
        The targets, and every matrix-shaped parameter left dense with the reason.
    """
    skip = list(skip)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    targets: list[Target] = []
    dense: list[Dense] = []
    taken: set[int] = set()
    embedding_name = next((n for n, m in model.named_modules() if m is embedding), None)
    for name, module in model.named_modules():
        kind = _kind(module, embedding)
        if kind is None:
            continue
        weight = module.weight
        if _matches(name, skip):
            dense.append(Dense(f"{name}.weight", weight.numel(), "named in modules_to_not_convert"))
        elif module is embedding or module is head:
            if embeddings:
                tie = embedding_name if module is head and tied else None
                shape = (int(weight.shape[0]), int(weight.shape[1]))
                targets.append(Target(name, "tied" if tie else kind, shape, role_of(name), tie))
            elif id(weight) not in taken:
                dense.append(
                    Dense(
                        f"{name}.weight",
                        weight.numel(),
                        "embedding or head; compress it with --embeddings on",
                    )
                )
        elif weight.numel() == 0:
            dense.append(Dense(f"{name}.weight", 0, "empty"))
        else:
            rows, columns = (weight.shape[1], weight.shape[0]) if kind == "conv1d" else weight.shape
            targets.append(Target(name, kind, (int(rows), int(columns)), role_of(name)))
        taken.add(id(weight))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in taken:
            reason = "experts kept as one tensor" if parameter.ndim == 3 else "not a linear layer"
            dense.append(Dense(name, parameter.numel(), reason))
    return targets, dense


def _kind(module: nn.Module, embedding: nn.Module) -> str | None:
    from torch import nn

    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    return "embedding" if module is embedding else None


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == p or name.endswith("." + p) or name.startswith(p + ".") for p in patterns)
