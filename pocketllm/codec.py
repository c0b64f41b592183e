"""The codec: encoder, codebook and decoder as arrays, and its training by the C kernels.

A codec turns normalised rows into indices and back. With norm "input" or "ln" its decoder is a
function of the codeword alone and folds into a table (:meth:`Codec.fold`); with "rln", the
published form, it needs the whole row. :mod:`pocketllm.codec_torch` is the same codec in PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from . import kernels
from .codec_init import kmeans_start, random_start
from .errors import PocketError
from .kmeans import KMeansResult, draw_by_error, kmeans, refine_table

__all__ = [
    "Codec",
    "EpochStats",
    "KMeansResult",
    "TrainResult",
    "index_entropy",
    "kmeans",
    "refine_table",
    "train_codec",
]

NORMS = ("input", "ln", "rln")
INITS = ("kmeans", "normal", "uniform")
# With fewer updates Adam cannot settle after its first, large steps; a random start takes longer to
# come to the same error.
DEFAULT_EPOCHS = 6
DEFAULT_UPDATES = {"kmeans": 300, "normal": 1500, "uniform": 1500}
# Below this share of used codewords a codec is reported as collapsed.
COLLAPSED_USAGE = 0.5
# Codewords are revived in the first part of the training only: later ones could not settle.
REVIVAL_PART = 0.6
# Sub-vectors looked at when dead codewords are replaced.
REVIVAL_SAMPLE = 65536


@dataclasses.dataclass
class Codec:
    """Parameters of one codec.

    Attributes:
        subvector: d.
        hidden: h.
        norm: ``"input"``, ``"ln"`` or ``"rln"``.
        encoder, decoder: flat float32 (3 (2 h d + h + d),): mlp0 | mlp1 | mlp2, each W1, b1, W2,
            b2.
        codebook: (K, d) float32, in the latent space.
    """

    subvector: int
    hidden: int
    norm: str
    encoder: np.ndarray
    decoder: np.ndarray
    codebook: np.ndarray

    @property
    def codewords(self) -> int:
        """K."""
        return len(self.codebook)

    @property
    def foldable(self) -> bool:
        """Is the decoder a function of the codeword alone?"""
        return self.norm != "rln"

    def fold(self) -> np.ndarray:
        """Table (K, d) float32 of what each codeword decodes to.

        Raises:
            PocketError: norm "rln", whose decoder needs the whole row.
        """
        if not self.foldable:
            raise PocketError('norm: got "rln", want "input" or "ln": only these decoders fold')
        return self.decode(self.codebook)

    def encode_latents(self, rows: np.ndarray) -> np.ndarray:
        """Latents (R, L*d) of normalised rows (R, L*d), float32."""
        return kernels.encode(
            rows, self.encoder, subvector=self.subvector, hidden=self.hidden, norm=self.norm
        )

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Rows (R, L*d) decoded from codewords laid out as rows (R, L*d), float32."""
        return kernels.decode(
            latents, self.decoder, subvector=self.subvector, hidden=self.hidden, norm=self.norm
        )

    def assign(self, rows: np.ndarray) -> np.ndarray:
        """Index (R, L) int32 of the codeword nearest to each latent, as published."""
        z = self.encode_latents(rows).reshape(-1, self.subvector)
        return kernels.nearest(z, self.codebook).reshape(len(rows), -1)

    def reconstruct(self, index: np.ndarray) -> np.ndarray:
        """Rows (R, L*d) float32 that indices (R, L) stand for."""
        return self.decode(self.codebook[index].reshape(len(index), -1))


@dataclasses.dataclass(frozen=True)
class EpochStats:
    """Means over one epoch.

    Attributes:
        loss: reconstruction + codebook_loss * commitment.
        reconstruction: mean weighted squared error of the rows.
        commitment: mean squared distance of latents and codewords.
        usage: share of the codewords chosen at least once.
        entropy: of the indices, in bits; log2 K when all are used alike.
        revived: dead codewords replaced at the end of the epoch.
        lr: learning rate.
    """

    loss: float
    reconstruction: float
    commitment: float
    usage: float
    entropy: float
    revived: int
    lr: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A trained codec and how it came about.

    Attributes:
        codec: after the last epoch, or the k-means start where training did not improve on it.
        history: one entry an epoch.
        error: mean weighted squared error of all rows, decoded from :meth:`Codec.assign`.
        usage: share of the codewords that all rows together use.
        entropy: of all indices, in bits.
        warnings: sentences for the user, empty when all is well.
    """

    codec: Codec
    history: list[EpochStats]
    error: float
    usage: float
    entropy: float
    warnings: list[str]


class Engine(Protocol):
    """What carries out the steps of a training: the C kernels here, PyTorch in codec_torch."""

    def step(
        self, rows: np.ndarray, weight: np.ndarray | None, lr: float
    ) -> tuple[float, float, float, np.ndarray]:
        """One update; returns loss, reconstruction, commitment and the indices chosen."""

    def latents(self, rows: np.ndarray) -> np.ndarray:
        """Latents of rows."""

    def replace(self, index: np.ndarray, codewords: np.ndarray) -> None:
        """Puts new codewords in place of those at ``index`` and forgets their Adam state."""

    def codec(self) -> Codec:
        """A copy of the codec as it is now."""


class KernelEngine:
    """Training by the C kernels; all parameters in one flat vector: encoder, codebook, decoder."""

    def __init__(self, codec: Codec, codebook_loss: float) -> None:
        self._like = codec
        self.codebook_loss = codebook_loss
        self.flat = np.concatenate([codec.encoder, codec.codebook.ravel(), codec.decoder])
        self.mean = np.zeros_like(self.flat)
        self.variance = np.zeros_like(self.flat)
        self.steps = 0
        self._book = slice(codec.encoder.size, codec.encoder.size + codec.codebook.size)

    def step(
        self, rows: np.ndarray, weight: np.ndarray | None, lr: float
    ) -> tuple[float, float, float, np.ndarray]:
        now = self._view()
        out = kernels.train_step(
            rows,
            now.encoder,
            now.codebook,
            now.decoder,
            hidden=now.hidden,
            norm=now.norm,
            codebook_loss=self.codebook_loss,
            weight=weight,
        )
        grad = np.concatenate([out.grad_encoder, out.grad_codebook.ravel(), out.grad_decoder])
        self.steps += 1
        kernels.adam(self.flat, grad, self.mean, self.variance, step=self.steps, lr=lr)
        return out.loss, out.reconstruction, out.commitment, out.indices

    def latents(self, rows: np.ndarray) -> np.ndarray:
        return self._view().encode_latents(rows)

    def replace(self, index: np.ndarray, codewords: np.ndarray) -> None:
        for part, values in ((self.flat, codewords), (self.mean, 0.0), (self.variance, 0.0)):
            part[self._book].reshape(self._like.codebook.shape)[index] = values

    def codec(self) -> Codec:
        now = self._view()
        return dataclasses.replace(
            now,
            encoder=now.encoder.copy(),
            decoder=now.decoder.copy(),
            codebook=now.codebook.copy(),
        )

    def _view(self) -> Codec:
        return dataclasses.replace(
            self._like,
            encoder=self.flat[: self._book.start],
            codebook=self.flat[self._book].reshape(self._like.codebook.shape),
            decoder=self.flat[self._book.stop :],
        )


def index_entropy(counts: np.ndarray) -> float:
    """Entropy in bits of indices that occur ``counts`` (K,) times."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum()) + 0.0


def train_codec(
    rows: np.ndarray | Sequence[np.ndarray],
    *,
    subvector: int,
    codewords: int,
    hidden: int = 16,
    norm: str = "input",
    init: str = "kmeans",
    epochs: int | None = None,
    batch: int = 16384,
    lr: float = 1.6e-2,
    codebook_loss: float = 0.5,
    weight: np.ndarray | Sequence[np.ndarray] | None = None,
    seed: int = 0,
    init_iterations: int = 8,
    progress: Callable[[float, str], None] | None = None,
    engine: Callable[[Codec, float], Engine] = KernelEngine,
) -> TrainResult:
    """Train one codec on normalised rows.

    Args:
        rows: (R, L*d) float32, normalised (see :mod:`pocketllm.layout`), L*d a multiple of d; or
            several such matrices when rows differ in length.
        subvector: d, 1 to 16.
        codewords: K, 2 to 65536, at most the number of sub-vectors.
        hidden: h, 1 to 64.
        norm: ``"input"``, ``"ln"`` or ``"rln"``.
        init: ``"kmeans"`` starts the codec at the k-means solution; ``"normal"`` and ``"uniform"``
            start with random MLPs and a codebook of that distribution, as published.
        epochs: passes over the rows; None: 6, or as many as 300 updates take (1500 from a random
            start). 0 returns the start.
        batch: sub-vectors a step, rounded to whole rows.
        lr: learning rate of Adam, multiplied by 0.1 after 30 %, 60 % and 90 % of the epochs.
        codebook_loss: lambda.
        weight: None, or weights of the squared errors, (L*d,) or (R, L*d); one for each matrix.
        seed: of initialisation, order of rows and revival.
        init_iterations: k-means iterations of ``init="kmeans"``.
        progress: called with the share of the work done and what is being done.
        engine: what computes the steps.

    Returns:
        A TrainResult; the same for any number of threads and every instruction set.

    Raises:
        PocketError: a setting out of range, or more codewords than sub-vectors.
    """
    groups = [np.ascontiguousarray(r, np.float32) for r in _listed(rows)]
    weights = [None] * len(groups) if weight is None else _listed(weight)
    _check(groups, subvector, codewords, hidden, norm, init)
    _check_weights(groups, weights)
    report = progress or (lambda share, what: None)
    if init == "kmeans":
        codec = Codec(
            subvector,
            hidden,
            norm,
            *kmeans_start(
                groups,
                subvector,
                codewords,
                hidden,
                norm,
                iterations=init_iterations,
                seed=seed,
                progress=lambda share: report(0.3 * share, "k-means"),
            ),
        )
    else:
        drawn = random_start(groups, subvector, codewords, hidden, norm, init == "uniform", seed)
        codec = Codec(subvector, hidden, norm, *drawn)
    running = engine(codec, codebook_loss)
    if epochs is None:
        updates = len(_batches(groups, batch, subvector, np.random.default_rng(seed)))
        epochs = max(DEFAULT_EPOCHS, -(-DEFAULT_UPDATES[init] // updates))
    history = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        rate = lr * 0.1 ** min(3, int(epoch / (0.3 * epochs)))
        counts = np.zeros(codewords, np.int64)
        sums = np.zeros(4)
        for group, chosen in _batches(groups, batch, subvector, rng):
            part = weights[group]
            if part is not None and part.ndim == 2:
                part = part[chosen]
            *losses, indices = running.step(groups[group][chosen], part, rate)
            sums += np.multiply([*losses, 1.0], len(indices))
            counts += np.bincount(indices, minlength=codewords)
        revived = 0
        if epoch < REVIVAL_PART * epochs and epoch + 1 < epochs:
            revived = _revive(running, groups, counts, rng, subvector)
        loss, reconstruction, commitment = sums[:3] / sums[3]
        usage = float((counts > 0).mean())
        history.append(
            EpochStats(
                loss, reconstruction, commitment, usage, index_entropy(counts), revived, rate
            )
        )
        report(0.3 + 0.7 * (epoch + 1) / epochs, "training")
    result = _result(running.codec(), groups, weights, history)
    if init == "kmeans" and epochs > 0:
        start = _result(codec, groups, weights, history)
        result = start if start.error < result.error else result
    return result


def _listed(arrays: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    return [arrays] if isinstance(arrays, np.ndarray) else list(arrays)


def _batches(
    groups: list[np.ndarray], batch: int, d: int, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """(matrix, its rows) of every step of an epoch, in random order."""
    steps = []
    for group, rows in enumerate(groups):
        order = rng.permutation(len(rows))
        per_step = max(1, batch * d // max(1, rows.shape[1]))
        steps += [(group, order[i : i + per_step]) for i in range(0, len(rows), per_step)]
    return [steps[i] for i in rng.permutation(len(steps))]


def _check(
    groups: list[np.ndarray], subvector: int, codewords: int, hidden: int, norm: str, init: str
) -> None:
    for name, value, low, high in (
        ("subvector", subvector, 1, 16),
        ("codewords", codewords, 2, 65536),
        ("hidden", hidden, 1, 64),
    ):
        if not low <= value <= high:
            raise PocketError(f"{name}: got {value}, want {low} to {high}")
    for name, choice, choices in (("norm", norm, NORMS), ("init", init, INITS)):
        if choice not in choices:
            raise PocketError(f"{name}: got {choice!r}, want one of {', '.join(choices)}")
    for rows in groups:
        if rows.ndim != 2 or rows.shape[1] % subvector:
            raise PocketError(
                f"rows: got shape {rows.shape}, want two dimensions, the second a multiple of "
                f"subvector {subvector}; pad the rows with zeros"
            )
    count = sum(rows.size for rows in groups) // subvector
    if count < codewords:
        raise PocketError(
            f"codewords: got {codewords} for {count} sub-vectors, want at most as many codewords "
            "as sub-vectors; take a smaller codebook or shorter sub-vectors"
        )


def _check_weights(groups: list[np.ndarray], weights: Sequence[np.ndarray | None]) -> None:
    if len(weights) != len(groups):
        raise PocketError(f"weight: got {len(weights)} arrays, want one for each of {len(groups)}")
    for rows, weight in zip(groups, weights, strict=True):
        if weight is not None and weight.shape not in (rows.shape, rows.shape[1:]):
            raise PocketError(
                f"weight: got shape {weight.shape}, want {rows.shape} or {rows.shape[1:]}"
            )


def _revive(
    running: Engine, groups: list[np.ndarray], counts: np.ndarray, rng: np.random.Generator, d: int
) -> int:
    """Replaces codewords that nothing chose by badly represented latents; returns how many."""
    dead = np.flatnonzero(counts == 0)
    if len(dead) == 0:
        return 0
    share = min(1.0, REVIVAL_SAMPLE * d / sum(rows.size for rows in groups))
    latents = []
    for rows in groups:
        sample = rng.choice(len(rows), int(np.ceil(share * len(rows))), replace=False)
        latents.append(running.latents(rows[np.sort(sample)]).reshape(-1, d))
    z = np.concatenate(latents)
    _, error = kernels.nearest(z, running.codec().codebook, return_error=True)
    chosen = draw_by_error(error, len(dead), rng)
    running.replace(dead[: len(chosen)], z[chosen])
    return len(chosen)


def _result(
    codec: Codec,
    groups: list[np.ndarray],
    weights: Sequence[np.ndarray | None],
    history: list[EpochStats],
) -> TrainResult:
    counts = np.zeros(codec.codewords, np.int64)
    error = 0.0
    for rows, weight in zip(groups, weights, strict=True):
        index = codec.assign(rows)
        counts += np.bincount(index.ravel(), minlength=codec.codewords)
        squared = np.square(rows - codec.reconstruct(index))
        error += float((squared if weight is None else weight * squared).sum(dtype=np.float64))
    usage, entropy = float((counts > 0).mean()), index_entropy(counts)
    warnings = []
    if usage < COLLAPSED_USAGE:
        warnings.append(
            f"codebook collapse: {np.count_nonzero(counts)} of {codec.codewords} codewords are "
            f"used ({entropy:.2f} of {np.log2(codec.codewords):.2f} bits); take a smaller "
            'codebook, init "kmeans" or a lower learning rate'
        )
    mean = error / sum(rows.size for rows in groups)
    return TrainResult(codec, history, mean, usage, entropy, warnings)
