"""All codecs of a compression, several trained at the same time.

A codec takes hundreds of short steps, after each of which threads would wait for one another. So
each thread trains codecs of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, wait

import numpy as np
import torch

from .config import PocketConfig
from .layout import naming, normalise
from .parallel import thread_pool
from .planning import Plan, training_subvectors
from .schema import CodecSpec
from .stored import StoredCodec, train_stored_codec
from .trellis_encode import FIT_ROWS, FIT_WEIGHTS, fit_magnitudes
from .weights import Weights
from .workspace import Workspace

# Times as many rows as would do are read for the sample that levels are fitted to.
ROWS_APART = 4
# Bytes of the sub-vectors that the codecs in training hold together, a small part of their memory.
HELD_TOGETHER = 2**26


def train_codecs(
    plan: Plan,
    weights: Weights,
    config: PocketConfig,
    workspace: Workspace,
    begin: Callable[[list[str]], Callable[[str, float], None]],
) -> tuple[dict[str, StoredCodec], list[str]]:
    """The codecs of a plan, from the workspace or trained now and kept there.

    Args:
        plan: which codecs for which matrices.
        weights: the matrices.
        config: training settings.
        workspace: where finished codecs wait.
        begin: called with the names of the codecs that are trained, if any; what it returns is
            called with a name and the share of that training that is done, by several threads.

    Returns:
        The codecs by name, and sentences for the user.

    Raises:
        PocketError: as train_stored_codec does.
    """
    parts = {name: f"codec-{number:04d}" for number, name in enumerate(plan.codecs)}
    loaded = {name: workspace.load(part) for name, part in parts.items()}
    found = {name: arrays for name, arrays in loaded.items() if arrays is not None}
    missing = [name for name in parts if name not in found]
    warnings: dict[str, Sequence[str]] = {}
    if missing:
        show, stopped = begin(missing), threading.Event()

        def train(name: str) -> None:
            def shown(share: float, _: str) -> None:
                if stopped.is_set():
                    raise CancelledError
                show(name, share)

            spec = plan.codecs[name]
            if spec.is_trellis:
                found[name] = fit_magnitudes(_level_sample(name, plan, weights, config))
            else:
                rows = _training_rows(name, plan, weights, config)
                trained = train_stored_codec(rows, spec, config, shown)
                warnings[name], found[name] = trained.warnings, trained.arrays()
            workspace.store(parts[name], found[name])

        # The long ones first: threads end together.
        missing.sort(key=lambda name: -_bytes(plan.codecs[name]) * plan.codecs[name].codebook)
        threads = torch.get_num_threads()
        fitting = HELD_TOGETHER // max(_bytes(plan.codecs[name]) for name in missing)
        pools = max(1, min(threads, len(missing), fitting))
        with thread_pool(pools, threads // pools) as pool:
            futures = [pool.submit(train, name) for name in missing]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in done:
                        future.result()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    codecs = {n: StoredCodec.from_arrays(spec, found[n]) for n, spec in plan.codecs.items()}
    return codecs, [f"{name}: {w}" for name in parts for w in warnings.get(name, [])]


def _bytes(spec: CodecSpec) -> int:
    """Of the sub-vectors that a codec is trained on, or the weights that levels are fitted to."""
    if spec.is_trellis:
        return 4 * FIT_WEIGHTS
    return 4 * training_subvectors(spec.codebook) * spec.subvector


def _level_sample(name: str, plan: Plan, weights: Weights, config: PocketConfig) -> np.ndarray:
    """Weights of matrices in trellis codes in the units of their rows, a seeded sample of variance
    1, as columns (FIT_ROWS, columns): those of all columns alike where there are any."""
    owners = [t for t in plan.targets if plan.codec_of[t.name] == name and not t.tied_to]
    alike = [t for t in owners if t.name not in plan.costs] or owners
    rng = np.random.default_rng([config.seed, 4])
    total = sum(t.weights for t in alike)
    found = []
    for target in alike:
        wanted = min(target.weights, -(-FIT_WEIGHTS * target.weights // total))
        count = min(target.shape[0], -(-wanted // target.shape[1]) * ROWS_APART)
        index = np.sort(rng.choice(target.shape[0], count, replace=False))
        with naming(target):
            values = normalise(weights.rows(target, index), 1, row_shift=config.row_shift).values
        found.append(rng.choice(values.ravel(), min(wanted, values.size), replace=False))
    sample = rng.permutation(np.concatenate(found))
    rows = min(FIT_ROWS, len(sample))
    sample = sample[: len(sample) // rows * rows]
    spread = sample.std()
    return (sample / spread if spread > 0 else sample).reshape(rows, -1)


def _training_rows(
    name: str, plan: Plan, weights: Weights, config: PocketConfig
) -> list[np.ndarray]:
    """Normalised rows of the codec's matrices, a seeded sample, grouped by length."""
    owners = [t for t in plan.targets if plan.codec_of[t.name] == name and not t.tied_to]
    spec = plan.codecs[name]
    total = sum(t.shape[0] * -(-t.shape[1] // spec.subvector) for t in owners)
    share = min(1.0, training_subvectors(spec.codebook) / total)
    groups: dict[int, list[np.ndarray]] = {}
    rng = np.random.default_rng([config.seed, 1])
    for target in owners:
        out = target.shape[0]
        count = max(1, round(share * out))
        index = np.arange(out)
        if count < out:
            index = np.sort(rng.choice(out, count, replace=False))
        with naming(target):
            rows = normalise(
                weights.rows(target, index),
                spec.subvector,
                row_scale=config.row_scale,
                row_shift=config.row_shift,
            )
        groups.setdefault(rows.values.shape[1], []).append(rows.values)
    return [np.concatenate(parts) for _, parts in sorted(groups.items())]
