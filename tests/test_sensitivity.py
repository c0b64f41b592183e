"""Sensitivities against PyTorch's own gradients and against the whole expectation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from pocketllm.calibrate import Calibrator
from pocketllm.layout import Target, walk
from pocketllm.sensitivity import (
    DRAWN_PASSES,
    LEAST,
    LENGTH,
    TOGETHER,
    random_windows,
    sensitivities,
    shortened,
)
from pocketllm.weights import LoadedWeights


def windows_of(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(3, 50, shape))


class TokenSquares:
    """Sums over tokens of the squares of each column of a matrix's gradients by single tokens,
    weighted by row, of one backward pass by autograd: the gradients made whole, one by one."""

    def __init__(
        self, model: nn.Module, targets: list[Target], spread: dict[str, np.ndarray]
    ) -> None:
        self.model, self.targets, self.spread = model, targets, spread
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for target in targets:
            model.get_submodule(target.name).register_forward_hook(self._note(target.name))

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            self.seen[name] = args[0].detach(), output

        return note

    def clear(self) -> None:
        for _, output in self.seen.values():
            output.grad = None

    def columns(self, name: str) -> np.ndarray:
        x, output = self.seen[name]
        assert output.grad is not None
        x, gradient = x.flatten(0, -2).double(), output.grad.flatten(0, -2).double()
        each = torch.einsum("tr,tc->trc", gradient, x)
        whole: np.ndarray = (
            (each.square() * torch.from_numpy(self.spread[name])[:, None]).sum((0, 1)).numpy()
        )
        return whole


def opened(model: nn.Module, windows: torch.Tensor, targets: list[Target]) -> Calibrator:
    return Calibrator(model, windows, [t.name for t in targets])


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("together", [None, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt", "gemma", "phi"])
def test_backward_is_autograd_layer_by_layer(architecture: str, together: int | None) -> None:
    model = tiny_model(architecture).requires_grad_(False)
    targets, _ = walk(model, embeddings=False)
    windows = windows_of(3, 7) if together is None else windows_of(3, together, 7)
    tokens = windows[0].numel()
    pulled = torch.randn(3, tokens, model.get_output_embeddings().weight.shape[1])
    with opened(model, windows, targets) as calibrator:
        states = [calibrator.first_inputs()]
        for index in range(len(calibrator)):
            states.append(calibrator.forward(index, states[-1]))
        gradients = calibrator.backward_head(states[-1], lambda window, x: pulled[window])
        rng = np.random.default_rng(0)
        spread = {t.name: rng.uniform(0.5, 2, t.shape[0]) for t in targets}
        squares: dict[str, np.ndarray] = {}
        for index in reversed(range(len(calibrator))):
            gradients, found = calibrator.backward(index, states[index], gradients, spread)
            squares |= found
    assert squares.keys() == {t.name for t in targets}

    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    first: list[torch.Tensor] = []
    calibrator._layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: first.append((args or [kwargs["hidden_states"]])[0]),
        with_kwargs=True,
    )
    model.requires_grad_(True)
    by_tokens = TokenSquares(model, targets, spread)
    expected = {t.name: 0.0 for t in targets}
    for window in range(3):
        model(input_ids=torch.atleast_2d(windows[window]), use_cache=False)
        first[-1].retain_grad()
        (seen[-1].flatten(0, -2) * pulled[window]).sum().backward()
        before = first[-1].grad.flatten(0, -2)
        torch.testing.assert_close(gradients[window], before, rtol=1e-3, atol=1e-5)
        for target in targets:
            expected[target.name] = expected[target.name] + by_tokens.columns(target.name)
    for name, columns in squares.items():
        np.testing.assert_allclose(columns, expected[name], rtol=2e-3, atol=1e-9)


def whole_expectation(
    model: nn.Module, windows: torch.Tensor, targets: list[Target]
) -> dict[str, np.ndarray]:
    """½ Σ_r s_r² E[g²] a token of each column, g of each token that passed, the expectation taken
    over every token of the vocabulary."""
    owners = [t for t in targets if not t.tied_to]
    spread = {}
    for target in owners:
        weight = model.get_submodule(target.name).weight.detach().double()
        spread[target.name] = weight.square().mean(0 if target.kind == "conv1d" else 1).numpy()
    model.requires_grad_(True)
    by_tokens = TokenSquares(model, owners, spread)
    found = {t.name: np.zeros(t.shape[1]) for t in owners}
    for window in windows:
        scores = torch.log_softmax(model(input_ids=window[None], use_cache=False).logits[0], -1)
        for position in scores:
            for score in position:
                by_tokens.clear()
                score.backward(retain_graph=True)
                for target in owners:
                    columns = by_tokens.columns(target.name) * float(score.detach().exp())
                    found[target.name] += columns
    model.requires_grad_(False)
    return {name: 0.5 * value / windows.numel() for name, value in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_draws_agree_with_the_whole_expectation(architecture: str) -> None:
    model = tiny_model(architecture).requires_grad_(False)
    targets, _ = walk(model, embeddings=False)
    windows = windows_of(1, 5)
    weights = LoadedWeights(model)
    with opened(model, windows, targets) as calibrator:
        drawn = [sensitivities(calibrator, weights, targets, seed) for seed in range(30)]
    expected = whole_expectation(model, windows, targets)
    floor = LEAST * sum(v.sum() for v in expected.values()) / sum(t.weights for t in targets)
    for target in targets:
        mean = np.mean([d[target.name].whole for d in drawn])
        whole = expected[target.name].sum()
        assert mean == pytest.approx(max(whole, floor * target.weights), rel=0.4)
        cost = np.mean([d[target.name].whole * d[target.name].cost for d in drawn], 0)
        if whole > floor * target.weights:
            assert np.corrcoef(cost, expected[target.name])[0, 1] > 0.8
        weight = model.get_submodule(target.name).weight.detach().double()
        weight = weight.T if target.kind == "conv1d" else weight
        energy = (weight.square().mean(0) / weight.square().mean()).numpy()
        np.testing.assert_allclose(drawn[0][target.name].energy, energy, rtol=6e-3)
        assert drawn[0][target.name].cost.sum() == pytest.approx(1, rel=0.01)


def test_embeddings_and_head() -> None:
    """A tied matrix bears the harm of look-up and head; both are above that of the head alone."""
    model = tiny_model("llama-tied").requires_grad_(False)
    targets, _ = walk(model, embeddings=True)
    windows = windows_of(1, 4)
    weights = LoadedWeights(model)
    with opened(model, windows, targets) as calibrator:
        drawn = [sensitivities(calibrator, weights, targets, seed) for seed in range(30)]
    assert "lm_head" not in drawn[0]
    spread = model.get_input_embeddings().weight.square().mean(1, keepdim=True)
    expected = 0.0
    for seed in range(30):  # the same expectation, by autograd on the whole model
        torch.manual_seed(seed)
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        weight.grad = None
        logits = model(input_ids=windows, use_cache=False).logits[0]
        token = torch.distributions.Categorical(logits=logits.detach()).sample()
        nn.functional.cross_entropy(logits, token, reduction="sum").backward()
        expected += float((weight.grad.square() * spread).sum()) / 30
    expected *= 0.5 / windows.numel()
    mean = np.mean([d["model.embed_tokens"].whole for d in drawn])
    assert mean == pytest.approx(expected, rel=0.4)


def test_workers_do_not_matter() -> None:
    model = tiny_model("llama").requires_grad_(False)
    targets, _ = walk(model, embeddings=True)
    windows = random_windows(50, 8, 0)
    assert windows.shape == (DRAWN_PASSES, TOGETHER, 8)
    assert windows.min() >= 0 and windows.max() < 50
    found = []
    for workers in (1, 3):
        names = [t.name for t in targets]
        with Calibrator(model, windows, names, workers=workers) as calibrator:
            found.append(sensitivities(calibrator, LoadedWeights(model), targets, 1))
    for name, harm in found[0].items():
        other = found[1][name]
        assert harm.whole == other.whole
        np.testing.assert_array_equal(harm.cost, other.cost)
        np.testing.assert_array_equal(harm.energy, other.energy)
    assert all(harm.whole > 0 and harm.cost.min() > 0 for harm in found[0].values())


@pytest.mark.parametrize(
    ("count", "length", "shape"),
    [(4, 512, (8, 16, 16)), (3, 120, (1, 16, 16)), (3, 40, (1, 6, 16)), (20, 9, (1, 16, 9))],
)
def test_windows_are_cut_into_pieces(count: int, length: int, shape: tuple[int, ...]) -> None:
    assert (TOGETHER, LENGTH) == (16, 16)
    windows = windows_of(count, length)
    cut = shortened(windows)
    assert cut.shape == shape
    size = min(LENGTH, length)
    pieces = [w[i : i + size] for w in windows for i in range(0, length - size + 1, size)]
    assert torch.equal(cut.flatten(0, 1), torch.stack(pieces[: shape[0] * shape[1]]))


@pytest.mark.parametrize("exponent", [-100, 100])
def test_matrices_of_any_magnitude(exponent: int) -> None:
    """Values times 2^100 and outputs times 2^-100 are the same model; powers of two leave all
    digits as they are."""
    windows, found = windows_of(2, 9), []
    for power in (0, exponent):
        model = tiny_model("llama").requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(2.0**power)
            layer.self_attn.o_proj.weight.mul_(2.0**-power)
        targets, _ = walk(model, embeddings=False)
        with opened(model, windows, targets) as calibrator:
            found.append(sensitivities(calibrator, LoadedWeights(model), targets, 0))
    as_they_are, scaled = found
    assert len({harm.whole for harm in as_they_are.values()}) > 1
    for name, harm in as_they_are.items():
        assert scaled[name].whole == harm.whole, name
        np.testing.assert_array_equal(scaled[name].cost, harm.cost)
        np.testing.assert_array_equal(scaled[name].energy, harm.energy)
