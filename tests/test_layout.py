"""Matrices as sub-vectors, and the walk over a model's modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from pocketllm.errors import PocketError
from pocketllm.layout import denormalise, matrix_of, normalise, role_of, subvector_count, walk

TINY = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
TINY_LLAMA = {**TINY, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**TINY_LLAMA),
    "llama-tied": LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY_LLAMA),
    "gemma": GemmaConfig(**TINY_LLAMA),
    "phi": PhiConfig(**TINY, intermediate_size=24),
    "opt": OPTConfig(**TINY, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=32),
}


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("shift", [False, True])
def test_normalised_rows_stand_for_the_matrix(columns: int, shift: bool) -> None:
    rng = np.random.default_rng(columns)
    weight = (rng.standard_normal((6, columns)) * rng.uniform(0.01, 30, (6, 1)) + 0.5).astype(
        np.float32
    )
    rows = normalise(weight, 4, row_shift=shift)
    assert rows.values.shape == (6, 4 * subvector_count(columns, 4))
    assert not rows.values[:, columns:].any()
    back = denormalise(rows.values, columns, rows.scale, rows.shift)
    # One rounding in the division and one in the product, plus one around the shift.
    np.testing.assert_allclose(back, weight, rtol=4e-7, atol=4e-7 * np.abs(weight).max())
    spread = np.sqrt((rows.values.astype(np.float64) ** 2).sum(1) / columns)
    assert (np.abs(spread - 1) <= 1 / 32).all()  # a scale has four bits of mantissa


def test_zero_and_constant_rows_are_harmless() -> None:
    weight = np.zeros((3, 8), np.float32)
    weight[1] = 5.0
    weight[2, 0] = 1e-12
    for shift in (False, True):
        rows = normalise(weight, 4, row_shift=shift)
        assert np.isfinite(rows.values).all() and rows.scale[0] == 0
        # Whatever a codec makes of a zero row, what comes back is the row.
        values = rows.values + (rows.scale == 0)[:, None]
        np.testing.assert_allclose(
            denormalise(values, 8, rows.scale, rows.shift), weight, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = np.ones((4, 8), np.float32)
    weight[2, 3] = bad
    with pytest.raises(PocketError, match="1 of 32 values are NaN or Inf"):
        normalise(weight, 4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_matrix_is_a_target_or_named_as_dense(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    targets, dense = walk(model, embeddings=False)
    names = {t.name for t in targets}
    expected = {
        n
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and m is not model.get_output_embeddings()
    }
    assert names == expected and names
    left = {d.name for d in dense}
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            assert parameter_name in left or parameter_name.removesuffix(".weight") in names
    for target in targets:
        module = model.get_submodule(target.name)
        matrix = matrix_of(module, target.kind)
        assert matrix.shape == target.shape
        x = torch.randn(3, target.shape[1])
        bias = 0 if module.bias is None else module.bias.detach().numpy()
        np.testing.assert_allclose(
            module(x).detach().numpy(), x.numpy() @ matrix.T + bias, rtol=1e-4, atol=1e-5
        )


def test_embeddings_and_head() -> None:
    tied, _ = walk(AutoModelForCausalLM.from_config(CONFIGS["llama-tied"]), embeddings=True)
    by_name = {t.name: t for t in tied}
    assert by_name["model.embed_tokens"].kind == "embedding"
    assert by_name["lm_head"].tied_to == "model.embed_tokens" and by_name["lm_head"].weights == 0
    untied, _ = walk(AutoModelForCausalLM.from_config(CONFIGS["llama"]), embeddings=True)
    assert {t.name: t.kind for t in untied}["lm_head"] == "linear"


def test_experts_and_skipped_modules_are_named() -> None:
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**TINY_LLAMA, num_local_experts=2, num_experts_per_tok=1)
    )
    targets, dense = walk(model, embeddings=False, skip=["q_proj", "model.layers.1"])
    experts = [d for d in dense if d.reason == "experts kept as one tensor"]
    assert sum(d.weights for d in experts) == 2 * 2 * 3 * 16 * 24
    assert not any(
        t.name.endswith("q_proj") or t.name.startswith("model.layers.1.") for t in targets
    )
    assert any(d.reason == "named in modules_to_not_convert" for d in dense)


def test_roles() -> None:
    assert role_of("model.layers.12.mlp.up_proj") == "model.layers.mlp.up_proj"
    assert role_of("transformer.h.0.attn.c_attn") == "transformer.h.attn.c_attn"
    assert role_of("lm_head") == "lm_head"
