"""How much an error in each matrix harms what the model says: diagonal Fisher information.

With small errors δ in the weights the model's predictions move by KL ≈ ½ δᵀ F δ, where F = E[g gᵀ]
and g is the gradient of the log-probability of a token drawn from the model's own prediction
(Kunstner et al., arXiv 1905.12558, section 2). Errors of quantised rows are about isotropic, so one
number a matrix says what a relative squared error of 1 would cost: ½ Σ_rc s_r² E[g_rc²], s_r the
root mean square of row r; where columns may get bits of their own, the terms of each say how they
share it. It differs between matrices of one model by three orders of magnitude; a
few windows are enough to find that, and tokens drawn at random are nearly as good as text.

The gradient of a window's sum stands for those of its predictions: where tokens are drawn from
these, the gradients of different predictions are uncorrelated. For a matrix it is a sum of outer
products, one for each token that passed; each is squared by itself. That leaves out what tokens
contribute to a prediction together, needs no gradient of a whole matrix, and is so much less noisy
that bits are shared out no worse. Layers are visited forwards, then backwards, one at a time, and
what goes from layer to layer waits in files; nothing depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from .calibrate import Calibrator, column_squares
from .layout import Target
from .memory import give_back
from .planning import Harm
from .weights import Weights

# Windows of text that are looked at.
WINDOWS = 4
# Tokens of the pieces that are looked at, and how many of these pass together: what a layer
# computes on them is kept until its gradients are known, by every thread. In longer pieces queries
# and keys count for more than quantising them harms (docs/METHOD.md).
LENGTH, TOGETHER = 16, 16
# Passes of pieces drawn at random, where there is no text.
DRAWN_PASSES = 4
# Rows of a matrix that are read at a time.
ROWS = 8192
# Least harm, as a share of what a matrix of this size does on average: where these few tokens never
# came by, others may.
LEAST = 0.02
# The same of a column, as a share of the average column.
LEAST_OF_COLUMN = 1e-4


def random_windows(vocabulary: int, longest: int, seed: int) -> torch.Tensor:
    """int64 (DRAWN_PASSES, TOGETHER, LENGTH, or ``longest`` if that is less) token numbers, drawn
    alike from the whole vocabulary."""
    shape = DRAWN_PASSES, TOGETHER, min(LENGTH, longest)
    return torch.from_numpy(np.random.default_rng([seed, 2]).integers(0, vocabulary, shape))


def shortened(windows: torch.Tensor) -> torch.Tensor:
    """The windows (n, length) cut into pieces (passes, at most TOGETHER, at most LENGTH); rests are
    left out."""
    length = min(LENGTH, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    together = min(TOGETHER, len(pieces))
    return pieces[: len(pieces) // together * together].view(-1, together, length)


def sensitivities(
    calibrator: Calibrator, weights: Weights, targets: Sequence[Target], seed: int
) -> dict[str, Harm]:
    """What a relative squared error of 1 would cost in each matrix, in nats a token.

    Args:
        calibrator: entered, over the windows to look at; knows the targets.
        weights: the model's.
        targets: matrices that may be compressed; a tied one counts for its owner.
        seed: of the tokens drawn from the predictions.

    Returns:
        Name of every target that owns a matrix -> its harm, numbers above zero, rounded to three
        digits, so that small differences in rounding do not matter.

    Raises:
        PocketError: the model has no output head.
    """
    owners = {t.name: t for t in targets if not t.tied_to}
    statistics = {name: _mean_squares(weights, t) for name, t in owners.items()}
    spread = {name: rows for name, (rows, _) in statistics.items()}
    found = {name: np.zeros(t.shape[1]) for name, t in owners.items()}
    states = [calibrator.first_inputs()]
    for index in range(len(calibrator)):
        states.append(calibrator.forward(index, states[-1]))
        give_back()
    tied = {t.name: t.tied_to for t in targets if t.tied_to}
    head = _Head(calibrator, weights, tied, spread, seed)
    outputs = states.pop()
    gradients = calibrator.backward_head(outputs, head.pull)
    outputs.close()
    for name, columns in head.harm.items():
        found[name] = found[name] + columns
    for index in reversed(range(len(calibrator))):
        gradients, squares = calibrator.backward(index, states[index], gradients, spread)
        if index > 0:
            states.pop().close()
        for name, columns in squares.items():
            found[name] = found[name] + columns
        give_back()
    embedding = _name_of(calibrator.model, calibrator.model.get_input_embeddings())
    if embedding in owners:
        harm = _embedding_harm(calibrator, spread[embedding], states[0], gradients)
        found[embedding] = found[embedding] + harm / len(found[embedding])
    states[0].close()
    scale = 0.5 / calibrator.windows.numel()
    wholes = _rounded({name: scale * float(c.sum()) for name, c in found.items()}, owners)
    return {
        name: Harm(whole, _shares(found[name]), _shares(statistics[name][1]) * len(found[name]))
        for name, whole in wholes.items()
    }


class _Head:
    """The output head: draws tokens from its predictions and pulls gradients back through it.

    Its bias, and what a model does to logits behind it, is left out.

    Attributes:
        harm: name of the head's matrix -> that of its columns so far, when it is a target.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        weights: Weights,
        tied: dict[str, str],
        spread: dict[str, np.ndarray],
        seed: int,
    ) -> None:
        model = calibrator.model
        matrix = model.get_output_embeddings().weight
        name = _name_of(model, model.get_output_embeddings())
        name = tied.get(name, name)
        self._target = Target(name, "linear", tuple(matrix.shape), name)
        self._weights = weights
        self._spread = spread.get(name)
        self._seed = seed
        self._harm_of_window: dict[int, np.ndarray] = {}

    @property
    def harm(self) -> dict[str, np.ndarray]:
        """See the class."""
        found = sum(self._harm_of_window[w] for w in sorted(self._harm_of_window))
        return {} if self._spread is None else {self._target.name: np.asarray(found)}

    def pull(self, window: int, x: torch.Tensor) -> torch.Tensor:
        """The gradient at x (length, hidden) of minus the log-probability of the tokens drawn."""
        rng = np.random.default_rng([self._seed, 3, window])
        norm = torch.full((len(x),), -torch.inf)
        best, drawn = norm.clone(), torch.zeros(len(x), dtype=torch.int64)
        for first, tile in self._tiles():
            logits = x @ tile.T
            norm = torch.logaddexp(norm, logits.logsumexp(1))
            # The largest of logits plus Gumbel noise is a draw from their softmax.
            waits = torch.from_numpy(rng.standard_exponential(logits.shape, dtype=np.float32))
            top, at = (logits - waits.log()).max(1)
            drawn = torch.where(top > best, at + first, drawn)
            best = torch.maximum(best, top)
        gradient, harm = torch.zeros_like(x), np.zeros(x.shape[1])
        for first, tile in self._tiles():
            error = (x @ tile.T - norm[:, None]).exp_()
            here = torch.nonzero((drawn >= first) & (drawn < first + len(tile)))[:, 0]
            error[here, drawn[here] - first] -= 1.0
            gradient += error @ tile
            if self._spread is not None:
                harm += column_squares([(x, error)], self._spread[first : first + len(tile)])
        self._harm_of_window[window] = harm
        return gradient

    def _tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, self._target.shape[0], ROWS):
            yield first, _rows(self._weights, self._target, first)


def _rows(weights: Weights, target: Target, first: int) -> torch.Tensor:
    """Up to ROWS rows of a matrix from ``first`` on, float32."""
    index = np.arange(first, min(first + ROWS, target.shape[0]))
    return torch.from_numpy(weights.rows(target, index))


def _mean_squares(weights: Weights, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """Mean square of every row (out,) and sum of the squares of every column (in,), float64."""
    rows, columns = [], np.zeros(target.shape[1])
    for part in weights.parts(target):
        squares = np.square(part, dtype=np.float64)
        rows.append(squares.mean(1))
        columns += squares.sum(0)
    return np.concatenate(rows), columns


def _shares(columns: np.ndarray) -> np.ndarray:
    """Of each column in a whole of 1, float32, to three digits; none is left without any."""
    whole = columns.sum()
    if not (np.isfinite(whole) and whole > 0):
        return np.full(len(columns), 1 / len(columns), np.float32)
    shares = np.maximum(columns / whole, LEAST_OF_COLUMN / len(columns))
    places = 10.0 ** (2 - np.floor(np.log10(shares)))
    return (np.rint(shares * places) / places).astype(np.float32)


def _embedding_harm(
    calibrator: Calibrator,
    spread: np.ndarray,
    inputs: Iterable[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> float:
    """Of errors in the rows that were looked up, through the first layer's input.

    Some models multiply what they look up; the ratio of magnitudes says by how much.
    """
    harm = power = looked_up = 0.0
    for tokens, state, gradient in zip(calibrator.windows, inputs, gradients, strict=True):
        rows = spread[tokens.flatten().numpy()]
        harm += float((gradient.square().sum(1, dtype=torch.float64).numpy() * rows).sum())
        power += float(state.square().mean(1, dtype=torch.float64).sum())
        looked_up += float(rows.sum())
    return harm * power / looked_up if looked_up > 0 else harm


def _name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _rounded(found: dict[str, float], owners: dict[str, Target]) -> dict[str, float]:
    """Three digits, and never below LEAST of the average; all alike where nothing was learnt."""
    weights = sum(t.weights for t in owners.values())
    whole = sum(found.values())
    density = whole / weights if np.isfinite(whole) and whole > 0 else 0.0
    if density == 0.0:
        return {name: float(t.weights) for name, t in owners.items()}
    return {
        name: float(f"{max(found[name], LEAST * density * t.weights):.3g}")
        for name, t in owners.items()
    }
