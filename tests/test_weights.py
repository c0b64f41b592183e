"""Weights read from files against the same model loaded by transformers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM

from pocketllm import calibrate, compressor, trellis
from pocketllm import weights as weights_module
from pocketllm.calibrate import Calibrator, HiddenStates
from pocketllm.checkpoint import open_checkpoint
from pocketllm.config import PocketConfig
from pocketllm.dense import load_model
from pocketllm.errors import PocketError
from pocketllm.hf import dense_tensors
from pocketllm.layout import Target, matrix_of, walk
from pocketllm.memory import give_back, peak_memory
from pocketllm.weights import LoadedWeights, StreamedWeights, Weights, open_weights

STREAMED = [name for name in ARCHITECTURES if name != "mixtral"]
CASES = [(name, dtype) for name in STREAMED for dtype in (torch.float32, torch.bfloat16)]


def saved(folder: Path, architecture: str, dtype: torch.dtype, shard: str = "40KB") -> Path:
    tiny_model(architecture, dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices come in several parts, of whole segments."""
    monkeypatch.setattr(weights_module, "ENCODED_TOGETHER", 500)
    monkeypatch.setattr(trellis, "SEGMENT", 8)


def matrix(weights: Weights, target: Target) -> np.ndarray:
    parts = list(weights.parts(target))
    assert len(parts) > 1 or parts[0].size < 500 or len(parts[0]) < 16
    assert all(len(part) % 8 == 0 for part in parts[:-1]) and len(parts[-1]) >= min(
        8, len(parts[0])
    )
    return np.concatenate(parts)


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_gives_what_loading_gives(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", architecture, dtype)
    weights, notes = open_weights(folder)
    assert isinstance(weights, StreamedWeights) and not notes
    dense = load_model(folder)
    assert all(p.device.type == "meta" for p in weights.model.parameters())
    buffers = dict(dense.named_buffers())
    for name, buffer in weights.model.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype
    targets, left = walk(weights.model, embeddings=True)
    assert (targets, left) == walk(dense, embeddings=True)
    some = np.array([0, 1, 5, 17])
    for target in [t for t in targets if not t.tied_to]:
        want = matrix_of(dense.get_submodule(target.name), target.kind)
        assert np.array_equal(matrix(weights, target), want)
        assert np.array_equal(weights.rows(target, some), want[some])
    for chosen in (targets, []):
        kept, want_kept = weights.kept(chosen), dense_tensors(dense, [t.name for t in chosen])
        assert list(kept) == list(want_kept)
        for name, source in want_kept.items():
            assert (kept[name].dtype, kept[name].shape) == (source.dtype, source.shape)
            assert np.array_equal(kept[name].data(), source.data())


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_calibrates_like_a_loaded_model(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Second moments and everything behind replaced weights, to the bit; nothing is kept."""
    folder = saved(tmp_path / "dense", architecture, dtype)
    windows = torch.from_numpy(np.random.default_rng(0).integers(3, 50, (5, 17)))

    def moments(weights: Weights) -> dict[str, np.ndarray]:
        targets = {t.name: t for t in walk(weights.model, embeddings=False)[0]}
        found: dict[str, np.ndarray] = {}
        with Calibrator(
            weights.model, windows, targets, workers=2, weights=weights, folder=tmp_path
        ) as calibrator:
            for layer in calibrator.layers():
                found.update(layer.hessians())
                for name in layer.targets:
                    half = matrix(weights, targets[name]) / 2
                    weights.replace(targets[name], lambda half=half: half)
            head = calibrator.head_hessian()
        assert head is not None
        return {**found, "head": head}

    streamed, _ = open_weights(folder)
    got, want = moments(streamed), moments(LoadedWeights(load_model(folder)))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], h) for name, h in want.items())
    assert all(p.device.type == "meta" for p in streamed.model.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    ("codec", "calibrated"), [("codebook", False), ("codebook", True), ("trellis", True)]
)
def test_same_bytes_as_from_a_loaded_model(
    codec: str, calibrated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if codec == "trellis":
        # The kernels' own segments, and matrices of more than two.
        monkeypatch.setattr(trellis, "SEGMENT", 256)
        model = tiny_llama.make(tmp_path / "dense", hidden=32, layers=1, intermediate_size=600)
    else:
        model = tiny_llama.make(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(tiny_llama.TEXT)
    config = PocketConfig(
        bits=4.0,
        embeddings=True,
        codec=codec,
        epochs=1 if codec == "codebook" else None,
        calibration=str(text) if calibrated else None,
        calibration_windows=3,
    )
    compressor.compress(model, tmp_path / "streamed", config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "ENCODED_TOGETHER", 1 << 23)
        patch.setattr(
            compressor, "open_weights", lambda folder: (LoadedWeights(load_model(folder)), [])
        )
        compressor.compress(model, tmp_path / "loaded", config, progress=False)
    layout = open_checkpoint(tmp_path / "loaded").layout
    up = layout.modules["model.layers.0.mlp.up_proj"]
    assert layout.codecs[up.codec].is_trellis == (codec == "trellis")
    streamed, loaded = digests(tmp_path / "streamed"), digests(tmp_path / "loaded")
    assert streamed == loaded


def test_converted_weights_are_loaded_whole_and_said_to_be(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "mixtral", torch.float32)
    weights, notes = open_weights(folder)
    assert isinstance(weights, LoadedWeights)
    assert len(notes) == 1 and "whole dense model" in notes[0]


def test_stored_dtypes_that_differ_from_the_config(tmp_path: Path) -> None:
    """transformers casts to the config's dtype when it loads."""
    folder = saved(tmp_path / "dense", "llama", torch.bfloat16, "5GB")
    path = folder / "model.safetensors"
    tensors = {
        n: t.float() if "norm" in n or "up_proj" in n else t for n, t in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    weights, _ = open_weights(folder)
    assert isinstance(weights, StreamedWeights)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, parameter in dense.named_parameters():
        assert weights.model.get_parameter(name).dtype == parameter.dtype == torch.bfloat16
    (up,) = [t for t in walk(dense, embeddings=False)[0] if t.name.endswith("0.mlp.up_proj")]
    assert np.array_equal(matrix(weights, up), matrix_of(dense.get_submodule(up.name), "linear"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_values_are_named(value: float, tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "gpt2", torch.bfloat16, "5GB")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PocketError, match=r"transformer\.h\.1\.mlp\.c_fc\.bias: holds NaN or Inf"):
        open_weights(folder)


def test_wants_safetensors(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama", torch.float32, "5GB")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PocketError, match="only safetensors files are read"):
        open_weights(folder)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama", torch.float32, "5GB")
    weights, _ = open_weights(folder)
    copy = tmp_path / "short"
    shutil.copy(folder / "model.safetensors", copy)
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.truncate(copy.stat().st_size // 2)
    with pytest.raises(PocketError, match="shorter"):
        for target in walk(weights.model, embeddings=True)[0]:
            matrix(weights, target)


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-5), (torch.int16, 2**-9)])
def test_moments_of_wide_inputs(
    kind: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch, float32_products: None
) -> None:
    """More rows than one block: only blocks on and below the diagonal are multiplied."""
    monkeypatch.setattr(calibrate, "MOMENT_ROWS", 16)
    monkeypatch.setattr(calibrate, "factor_dtype", lambda: kind)
    model = tiny_model("llama")
    windows = torch.from_numpy(np.random.default_rng(0).integers(3, 50, (5, 17)))
    name, inputs = "model.layers.0.mlp.down_proj", []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    handle.remove()
    with Calibrator(model, windows, [name], workers=2) as calibrator:
        h = next(calibrator.layers()).hessians()[name]
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
    want = (x.T @ x / len(x)).numpy()
    assert np.abs(h - want).max() <= tolerance * np.abs(want).max()
    assert np.array_equal(h, h.T)


def test_hidden_states_wait_in_a_file(tmp_path: Path) -> None:
    states = [torch.randn(6, 10) for _ in range(4)]
    kept = HiddenStates(4, states[0], tmp_path)
    for window in (2, 0, 3, 1):
        kept[window] = states[window]
    kept[1] = states[1] + 1
    assert torch.equal(kept[3], states[3]) and torch.equal(kept[1], states[1] + 1)
    assert not list(tmp_path.iterdir())
    kept.close()


def test_peak_memory_counts_this_process() -> None:
    before = peak_memory()
    block = np.ones(1 << 27, np.uint8)
    assert peak_memory() >= min(before + (1 << 26), block.nbytes)
    give_back()
