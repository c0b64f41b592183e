"""The allocation meets its budget, spends it where it helps, and says when it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import pytest

from pocketllm import trellis_bits
from pocketllm.allocate import (
    LADDERS,
    Rate,
    Rung,
    Shape,
    allocate,
    codec_bits,
    payload_bits,
    predicted_error,
)
from pocketllm.errors import PocketError
from pocketllm.layout import Target
from pocketllm.schema import CodecSpec
from pocketllm.trellis_bits import Sharing, share_bits


def spec_of(shape: Rung) -> CodecSpec:
    if isinstance(shape, Rate):
        return CodecSpec.trellis("t")
    return CodecSpec("c", shape.subvector, shape.codewords, 16, "input", "table-int8")


def together(shapes: Mapping[str, Rung]) -> dict[str, str]:
    return dict.fromkeys(shapes, "g")


def model_targets() -> list[Target]:
    targets = []
    for layer in range(4):
        for role, shape in (("q", (256, 256)), ("up", (768, 256)), ("down", (256, 766))):
            targets.append(Target(f"layers.{layer}.{role}", "linear", shape, f"layers.{role}"))
    return [
        *targets,
        Target("embed", "embedding", (1000, 256), "embed"),
        Target("head", "tied", (1000, 256), "head", "embed"),
    ]


def total_bits(targets: list[Target], shapes: dict[str, Rung]) -> int:
    payload = sum(payload_bits(t, shapes[t.name], row_scale=True, row_shift=False) for t in targets)
    return payload + sum(codec_bits(spec) for spec in set(map(spec_of, shapes.values())))


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("bits", [0.8, 1.1, 2.0, 2.37, 3.0, 3.4, 4.0, 5.1, 7.5])
def test_budget_is_met_and_used(bits: float, ladder: str) -> None:
    targets = model_targets()
    weights = sum(t.weights for t in targets)
    shapes = allocate(
        targets,
        bits * weights,
        spec_of=spec_of,
        groups_of=together,
        ladder=ladder,
    )
    spent = total_bits(targets, shapes) / weights
    assert spent <= bits
    assert spent > bits - 0.15
    assert shapes["head"] == shapes["embed"]
    assert set(shapes.values()) <= set(LADDERS[ladder])


def test_the_embedding_gets_more_bits_than_a_layer() -> None:
    targets = model_targets()
    weights = sum(t.weights for t in targets)
    shapes = allocate(
        targets,
        3 * weights,
        spec_of=spec_of,
        groups_of=together,
    )
    assert shapes["embed"].rate > max(shapes[t.name].rate for t in targets if t.kind == "linear")


def test_a_sensitive_matrix_gets_its_bits_from_the_others() -> None:
    """Sixteen times the harm is worth two bits (reverse water-filling: errors go with 4**-rate),
    and some more where the shorter sub-vectors of higher rates are less efficient."""
    targets = [t for t in model_targets() if t.kind == "linear"]
    weights = sum(t.weights for t in targets)
    harm = {t.name: float(t.weights) for t in targets}
    harm["layers.2.q"] *= 16
    shapes = allocate(targets, 2.5 * weights, spec_of=spec_of, groups_of=together, harm_of=harm)
    rest = [shapes[t.name].rate for t in targets if t.name != "layers.2.q"]
    assert 1.5 <= shapes["layers.2.q"].rate - np.median(rest) <= 3
    # Only the ratios count.
    scaled = {name: 1e-9 * value for name, value in harm.items()}
    assert shapes == allocate(
        targets, 2.5 * weights, spec_of=spec_of, groups_of=together, harm_of=scaled
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_price_of_a_bit_gives_a_better_choice(seed: int) -> None:
    """Each price gives every matrix the rung of least harm and cost; fewer tables must not lose
    against that."""
    targets, ladder = model_targets(), LADDERS["quality"]
    owners = [t for t in targets if not t.tied_to]
    spread = np.exp(1.5 * np.random.default_rng(seed).standard_normal(len(owners)))
    harm = {t.name: t.weights * float(x) for t, x in zip(owners, spread, strict=True)}
    budget = 2.5 * sum(t.weights for t in targets)
    shapes = allocate(targets, budget, spec_of=spec_of, groups_of=together, harm_of=harm)

    def harm_with(target: Target, rung: Rung) -> float:
        return harm[target.name] * predicted_error(rung)

    least = np.inf
    for price in np.geomspace(1e-4, 10, 200):
        chosen: dict[str, Rung] = {}
        for t in owners:
            allowed = [r for r in ladder if r.codewords * r.subvector <= t.weights]
            bits = {r: payload_bits(t, r, row_scale=True, row_shift=False) for r in allowed}
            chosen[t.name] = min(allowed, key=lambda r: harm_with(t, r) + price * bits[r])
        if total_bits(owners, chosen) <= budget:
            least = min(least, sum(harm_with(t, chosen[t.name]) for t in owners))
    assert sum(harm_with(t, shapes[t.name]) for t in owners) <= least * (1 + 1e-9)


def test_columns_that_differ_save_bits() -> None:
    """A matrix whose harm is in few columns needs fewer bits, and others get them."""
    targets = [t for t in model_targets() if t.kind == "linear"]
    weights = sum(t.weights for t in targets)
    few = np.sort(np.exp(3 * np.random.default_rng(0).standard_normal(766)))
    down = [t.name for t in targets if t.name.endswith("down")]
    shares = {name: Sharing(few / few.sum()) for name in down}
    alike, apart = (
        allocate(
            targets,
            3 * weights,
            spec_of=spec_of,
            groups_of=together,
            shares_of=given,
            ladder="trellis",
        )
        for given in ({}, shares)
    )
    for target in targets:
        less = target.name in shares
        assert (apart[target.name].rate < alike[target.name].rate) == less
    spent = sum(
        payload_bits(t, apart[t.name], row_scale=True, row_shift=False, shares=shares.get(t.name))
        for t in targets
    )
    assert 2.9 * weights < spent <= 3 * weights


def test_bits_of_columns_are_found_once_for_each_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def counted(harm: np.ndarray, row_bytes: int) -> np.ndarray:
        given.append(row_bytes)
        return share_bits(harm, row_bytes)

    monkeypatch.setattr(trellis_bits, "share_bits", counted)
    targets = [Target("a", "linear", (64, 512), "a")]
    shares = Sharing(np.random.default_rng(0).random(512) / 256)
    allocate(
        targets,
        3 * 64 * 512,
        spec_of=spec_of,
        groups_of=together,
        shares_of={"a": shares},
        ladder="trellis",
    )
    assert sorted(given) == [16 * quarters for quarters in range(4, 25)]


def test_no_codebook_is_larger_than_the_matrix() -> None:
    targets = [Target("a", "linear", (16, 16), "a"), Target("b", "linear", (256, 256), "b")]
    shapes = allocate(targets, 6 * 65792, spec_of=spec_of, groups_of=together)
    assert shapes["a"].codewords * shapes["a"].subvector <= 256


def test_an_impossible_budget_names_the_least() -> None:
    targets = model_targets()
    weights = sum(t.weights for t in targets)
    with pytest.raises(PocketError, match="cannot be met, the least here is") as failure:
        allocate(targets, 0.3 * weights, spec_of=spec_of, groups_of=together)
    least = float(str(failure.value).rsplit(" ", 1)[1])
    allocate(targets, least * weights, spec_of=spec_of, groups_of=together)


def test_index_bits_and_payload() -> None:
    assert [Shape(4, k).index_bits for k in (2, 3, 4, 255, 256, 257, 65536)] == [
        1,
        2,
        2,
        8,
        8,
        9,
        16,
    ]
    target = Target("t", "linear", (3, 10), "t")
    # 3 sub-vectors of 4 -> 3 indices of 5 bits -> 2 bytes a row; scale, shift: 1 + 3 bytes each.
    bits = payload_bits(target, Shape(4, 32), row_scale=True, row_shift=True)
    assert bits == 3 * 16 + 2 * 8 * (1 + 3)
    # Two planes of 2 bytes a row, and a third in two of four rows: here in the second.
    bits = payload_bits(target, Rate(10), row_scale=True, row_shift=False)
    assert bits == (2 * 4 + 6) * 8 + 8 * (1 + 3)
    # Of 300 columns two blocks take a row's 37 bytes, 16 a bit; each column has a byte.
    wide = Target("w", "linear", (3, 300), "w")
    shares = Sharing(np.r_[np.full(128, 0.004), np.full(172, 0.002)])
    bits = payload_bits(wide, Rate(4), row_scale=True, row_shift=False, shares=shares)
    assert bits == 3 * 8 * 32 + 8 * (1 + 3) + 8 * 300


def test_predicted_errors_fall_with_the_rate() -> None:
    for name, ladder in LADDERS.items():
        errors = [predicted_error(s, name) for s in sorted(ladder, key=lambda s: s.rate)]
        assert all(a > b for a, b in zip(errors, errors[1:], strict=False))
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000)
    # Lloyd's algorithm from the best point density of a Gaussian, p^(1/3): variance 3.
    levels = np.array([NormalDist(0, 3**0.5).inv_cdf((k + 0.5) / 128) for k in range(128)])
    for _ in range(5):
        nearest = np.abs(x[:, None] - levels).argmin(1)
        used = np.bincount(nearest, minlength=128)
        sums = np.bincount(nearest, weights=x, minlength=128)
        levels = np.where(used > 0, sums / np.maximum(used, 1), levels)
    measured = np.square(x - levels[np.abs(x[:, None] - levels).argmin(1)]).mean()
    assert 0.8 < measured / predicted_error(Shape(1, 128)) < 1.2
