"""Plans: every codec has matrices of its own to learn from, and sizes follow the request."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from pocketllm import PocketConfig
from pocketllm.planning import make_plan


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
