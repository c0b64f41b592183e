"""Second moments against full forward passes of tiny models of several architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from pocketllm import kernels
from pocketllm.calibrate import Calibrator, decoder_layers, read_windows
from pocketllm.errors import PocketError
from pocketllm.layout import walk

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(3, 50, (5, 17)))


class Words:
    """A tokenizer: one token for each word, its length."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def names_of(model: nn.Module) -> list[str]:
    return [t.name for t in walk(model, embeddings=False)[0]]


def collect(model: nn.Module, change: Any = None, workers: int = 1) -> dict[str, np.ndarray]:
    moments: dict[str, np.ndarray] = {}
    with Calibrator(model, WINDOWS, names_of(model), workers=workers) as calibrator:
        for layer in calibrator.layers():
            moments.update(layer.hessians())
            if change:
                for name in layer.targets:
                    change(model.get_submodule(name).weight)
        head = calibrator.head_hessian()
    assert head is not None
    return {**moments, "head": head}


def naive(model: nn.Module) -> dict[str, np.ndarray]:
    """X'X / n of every linear's input in one plain forward pass, in float64."""
    inputs: dict[str, list[torch.Tensor]] = {}
    head = model.get_output_embeddings()
    modules = {n: model.get_submodule(n) for n in names_of(model)} | {"head": head}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0]))
        for n, m in modules.items()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    flat = {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for n, xs in inputs.items()}
    return {n: (x.double().T @ x.double() / len(x)).numpy() for n, x in flat.items()}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, h in want.items():
        assert got[name].dtype == np.float32
        assert np.abs(got[name] - h).max() <= 1e-5 * np.abs(h).max(), name


def has_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are those of a machine with this instruction set."""
    monkeypatch.setattr(kernels, "available_isas", lambda: [isa])
    monkeypatch.setattr(kernels, "isa", lambda: isa)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_a_full_forward(architecture: str) -> None:
    model = tiny_model(architecture)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    assert_close(collect(model), naive(model))
    after = model.state_dict()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert "forward" not in vars(decoder_layers(model)[1][0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "isa, dtype, tolerance",
    [
        # bfloat16 has eight bits: each rounding errs by at most 2^-9, in a few products one behind
        # the other.
        ("amx", torch.bfloat16, 2**-6),
        ("avx2", torch.float32, 2**-9),
        ("scalar", torch.float32, 2**-6),  # torch may round to bfloat16
    ],
)
def test_factors_may_be_rounded(
    isa: str,
    dtype: torch.dtype,
    tolerance: float,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = 0

    def counted(*args: Any) -> Any:
        nonlocal products
        products += 1
        return linear_of(*args)

    linear_of = kernels.rounded_linear
    monkeypatch.setattr(kernels, "rounded_linear", counted)
    has_isa(isa, monkeypatch)
    model = tiny_model(architecture)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    matmul = torch.backends.mkldnn.matmul
    seen: set[Any] = set()
    linear = decoder_layers(model)[1][0].self_attn.q_proj
    linear.register_forward_hook(
        lambda m, args, y: seen.add((matmul.fp32_precision, m.weight.dtype, y.dtype))
    )
    got = collect(model)
    assert seen == {("bf16", dtype, torch.float32)}
    assert matmul.fp32_precision == "none" and "forward" not in vars(linear)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert (products > 0) == (isa == "avx2")
    for name, h in naive(model).items():
        assert np.linalg.norm(got[name] - h) <= tolerance * np.linalg.norm(h), name


@pytest.mark.parametrize("isa", ["amx", "avx2"])
def test_a_linear_with_its_own_forward_stays_float32(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_isa(isa, monkeypatch)
    model = tiny_model("llama")
    linear = decoder_layers(model)[1][0].self_attn.q_proj
    own = linear.forward = lambda x: nn.functional.linear(x, linear.weight)
    got = collect(model)
    assert linear.forward is own
    for name, h in naive(model).items():
        assert np.linalg.norm(got[name] - h) <= 2**-6 * np.linalg.norm(h), name


@pytest.mark.usefixtures("float32_products")
def test_later_layers_see_the_replaced_weights() -> None:
    def halve(weight: torch.Tensor) -> None:
        weight.data.mul_(0.5)

    model = tiny_model("llama")
    dense = naive(model)
    got = collect(model, halve)
    halved = naive(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        first, second = (f"model.layers.{i}.self_attn.{name}" for i in (0, 1))
        assert np.allclose(got[first], dense[first], rtol=0, atol=1e-5 * dense[first].max())
        assert np.allclose(got[second], halved[second], rtol=0, atol=1e-5 * halved[second].max())
        tolerance = 1e-3 * dense[second].max()
        assert not np.allclose(dense[second], halved[second], rtol=0, atol=tolerance)
    # Within a layer, linears see what the dense linears before them give.
    down = "model.layers.0.mlp.down_proj"
    assert np.allclose(got[down], dense[down], rtol=0, atol=1e-5 * dense[down].max())


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_bf16_model_is_run_in_float32_and_given_back(architecture: str) -> None:
    model = tiny_model(architecture, torch.bfloat16)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    got = collect(model)
    after = model.state_dict()
    assert all(p.dtype == torch.bfloat16 and torch.equal(after[n], p) for n, p in before.items())
    assert_close(got, naive(model.float()))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "amx"])
def test_workers_do_not_change_a_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has_isa(isa, monkeypatch)
    model = tiny_model("qwen3")
    one, three = collect(model, workers=1), collect(model, workers=3)
    assert all(np.array_equal(h, three[n]) for n, h in one.items())
    threads = torch.get_num_threads()
    collect(model, workers=2)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("float32_products")
def test_linears_called_twice_give_all_their_inputs() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x, plain=plain: plain(x) + plain(x / 2)
    assert_close(collect(model), naive(model))


def test_a_window_ends_where_the_last_linear_has_its_input() -> None:
    model = tiny_model("llama")
    computed: list[int] = []
    last = model.model.layers[0].mlp.down_proj
    last.register_forward_hook(lambda *_: computed.append(1))
    collect(model, workers=2)
    # Four windows show what is called; all five go on to the next layer.
    assert len(computed) == 4 + len(WINDOWS)


def test_inputs_in_common_are_summed_once() -> None:
    model = tiny_model("llama")
    moments = collect(model)
    attention = [moments[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"]
    assert attention[0] is attention[1] is attention[2]
    assert attention[0] is not moments["model.layers.0.mlp.gate_proj"]
    assert all(np.array_equal(h, h.T) for h in moments.values())


def test_resuming_skips_the_moments() -> None:
    def halve(weight: torch.Tensor) -> None:
        weight.data.mul_(0.5)

    whole = collect(tiny_model("llama"), halve)
    model = tiny_model("llama")
    with Calibrator(model, WINDOWS, names_of(model)) as calibrator:
        for number, layer in enumerate(calibrator.layers()):
            moments = layer.hessians() if number == 1 else {}
            for name in layer.targets:
                halve(model.get_submodule(name).weight)
    for name, h in moments.items():
        assert np.array_equal(h, whole[name]), name


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2", torch.bfloat16)
    with pytest.raises(RuntimeError), Calibrator(model, WINDOWS, names_of(model)) as calibrator:
        for _ in calibrator.layers():
            raise RuntimeError
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model(input_ids=WINDOWS).logits.shape == (5, 17, 50)


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join("x" * (i % 40 + 1) for i in range(100)), encoding="utf-8")
    windows = read_windows(text, Words(), 3, 10)
    numbers = torch.arange(100) % 40 + 1
    assert torch.equal(windows, torch.stack([numbers[i * 10 : i * 10 + 10] for i in (0, 4, 9)]))
    assert read_windows(text, Words(), 99, 10).shape == (10, 10)


def test_refusals(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b c", encoding="utf-8")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (tmp_path / "none.txt", "cannot read"),
        (short, "has 3 tokens, give at least 10"),
        (binary, "not UTF-8"),
    ):
        with pytest.raises(PocketError, match=words):
            read_windows(path, Words(), 4, 10)
    with pytest.raises(PocketError, match="token 77 is outside the model's 50"):
        Calibrator(tiny_model("llama"), torch.full((1, 4), 77), [])
    with pytest.raises(PocketError, match="no list of decoder layers"):
        decoder_layers(nn.Linear(2, 2))
