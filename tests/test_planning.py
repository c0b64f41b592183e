"""Plans: every codec has matrices of its own to learn from, and sizes follow the request."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_model

from pocketllm import PocketConfig, cli
from pocketllm.commands import print_plan
from pocketllm.layout import walk
from pocketllm.planning import Harm, make_plan, predict_speeds


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("bits", [2.5, 3.5, 5.0])
def test_every_codec_is_learnt_from_some_matrix(architecture: str, bits: float) -> None:
    plan = make_plan(tiny_model(architecture), PocketConfig(bits=bits, embeddings=True))
    owners = [t for t in plan.targets if not t.tied_to]
    assert {plan.codec_of[t.name] for t in owners} == plan.codecs.keys()
    for target in plan.targets:
        if target.tied_to:
            assert plan.codec_of[target.name] == plan.codec_of[target.tied_to]
    assert plan.bits_per_weight <= bits
    assert plan.weights == sum(t.weights for t in owners)


@pytest.mark.parametrize(
    ("bits", "storage"),
    [(1.0, "table-int8"), (1.5, "trellis"), (6.5, "trellis"), (7.5, "table-int8")],
)
def test_sizes_that_trellis_codes_cannot_have_are_met_with_codebooks(
    bits: float, storage: str
) -> None:
    """They have 1 to 6 bits, to which row scales and the codec add some in a tiny model."""
    plan = make_plan(tiny_model("llama"), PocketConfig(bits=bits, codec="trellis"))
    assert {codec.storage for codec in plan.codecs.values()} == {storage}
    assert set(plan.rates) == ({t.name for t in plan.targets} if storage == "trellis" else set())
    assert all(1 <= rate.rate <= 6 for rate in plan.rates.values())
    assert bits - 0.15 < plan.bits_per_weight <= bits


def test_a_matrix_that_needs_more_bits_than_a_trellis_has_gets_a_codebook(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the help says. Errors that harm 30 times as much are worth log4(30) = 2.5 bits more."""
    model = tiny_model("llama")
    targets, _ = walk(model, embeddings=False)
    harm_of = {}
    for target in targets:
        alike = np.ones(target.shape[1], np.float32)
        times = 30.0 if target is targets[0] else 1.0
        harm_of[target.name] = Harm(times * target.weights, alike / len(alike), alike)
    plan = make_plan(model, PocketConfig(bits=5, codec="trellis"), harm_of)
    assert plan.codecs[plan.codec_of[targets[0].name]].codebook == 128
    assert plan.rates.keys() == {t.name for t in targets[1:]}
    with pytest.raises(SystemExit):
        cli.main(["compress", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "codebooks for matrices that need fewer than 1 or more than 6 bits" in said


def test_speeds_are_measured_and_slow_codecs_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = PocketConfig(subvector=4, codebook=32, norm="rln")
    plan = make_plan(tiny_model("llama"), config)
    plan.speeds = predict_speeds(plan, config)
    # A decoder that runs for every row cannot keep up with a dense matrix.
    (name,) = plan.codecs
    assert 0 < plan.speeds[name] < 1
    print_plan(plan)
    assert f"note: {name}: slower than dense" in capsys.readouterr().out
    plan.speeds = {name: 2.5}
    print_plan(plan)
    said = capsys.readouterr().out
    assert "2.5x" in said and "note" not in said


def test_advice_fits_the_codecs_that_are_slow(capsys: pytest.CaptureFixture[str]) -> None:
    """Six bits are more than d = 4 can have."""
    plan = make_plan(tiny_model("llama"), PocketConfig(bits=6.1, codec="trellis"))
    plan.speeds = {"trellis": 0.9}
    print_plan(plan)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert note.startswith("note: trellis: slower than dense bf16 for one token here; fewer bits")
    assert "--prefer speed" in note and "d = 4" not in note
    plan = make_plan(tiny_model("llama"), PocketConfig(bits=6.1, codec="codebook"))
    plan.speeds = dict.fromkeys(plan.codecs, 0.9)
    print_plan(plan)
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and all(name in said for name in plan.codecs)
    assert "d = 4 with up to" in said and "fewer bits" not in said
