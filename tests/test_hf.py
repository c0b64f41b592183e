"""Compressed checkpoints in the Hugging Face stack: load, generate, save, dequantise, adapt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import ARCHITECTURES, tiny_model, tokens, write_tiny
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

import pocketllm._autoload
from pocketllm import kernels
from pocketllm.checkpoint import decompress, open_checkpoint
from pocketllm.config import PocketConfig
from pocketllm.errors import CheckpointError, PocketError
from pocketllm.hf import PocketQuantizer, install_compressed
from pocketllm.in_memory import compress_in_memory
from pocketllm.linear import PocketEmbedding, PocketLinear, PocketTiedLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Register, without transformers' progress bars, and products without rounded activations."""
    pocketllm._autoload.install()
    transformers_logging.disable_progress_bar()
    before = kernels.activations()
    kernels.set_activations("float32")
    yield
    kernels.set_activations(before)


def load(folder: Path, cls: Any = AutoModelForCausalLM, **options: Any) -> nn.Module:
    """from_pretrained that finds every tensor in its place."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of a fixed batch."""
    with torch.no_grad():
        return model(tokens()).logits


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    """Same names, dtypes, bits."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- every architecture -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "storage"),
    [
        *((name, storage) for name in ARCHITECTURES for storage in ("decoder", "table-int8")),
        *((name, "trellis") for name in ("llama-tied", "gemma", "mixtral", "gpt2")),
    ],
)
def test_architectures(tmp_path: Path, architecture: str, storage: str) -> None:
    """Loaded = decompressed and loaded as dense; saved again = loaded; dequantised = dense."""
    original = tiny_model(architecture)
    embeddings = storage != "decoder"
    folder = write_tiny(
        tmp_path / "model", original, embeddings=embeddings, shift=embeddings, storage=storage
    )
    model = load(folder)
    packed = [m for m in model.modules() if isinstance(m, PocketLinear | PocketEmbedding)]
    left = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    assert packed and len(left) == (0 if embeddings else 1)
    assert any(isinstance(m, PocketEmbedding) for m in packed) == embeddings
    tied = embeddings and getattr(original.config, "tie_word_embeddings", False)
    assert any(isinstance(m, PocketTiedLinear) for m in packed) == tied

    dense = load(decompress(folder, tmp_path / "dense"))
    assert not any(isinstance(m, PocketLinear | PocketEmbedding) for m in dense.modules())
    assert dense.state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)

    model.save_pretrained(tmp_path / "again")
    open_checkpoint(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same_state(model, again)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "third")
    first, second = (open_checkpoint(tmp_path / name) for name in ("again", "third"))
    assert first.config == second.config
    assert first.files[0].metadata == second.files[0].metadata

    restored = again.dequantize()
    assert_same_state(restored, dense)
    restored.save_pretrained(tmp_path / "restored")
    assert_same_state(load(tmp_path / "restored"), dense)


@pytest.mark.parametrize("storage", ["table-int8", "trellis"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype, storage: str) -> None:
    original = tiny_model("llama-tied", torch.bfloat16)
    folder = write_tiny(tmp_path / "model", original, storage=storage)
    model = load(folder, dtype=dtype)
    assert model.dtype == dtype and logits(model).dtype == dtype
    for name, tensor in model.state_dict().items():
        if name.endswith((".scale", ".shift", ".columns")):
            assert tensor.dtype == torch.uint8
        elif name.endswith(("table_scale", "magnitude_scale")):
            assert tensor.dtype == torch.float32
        elif name.endswith((".table", ".magnitude")):
            assert tensor.dtype == torch.int8
        elif name.endswith("norm.weight"):
            assert tensor.dtype == dtype
    full = load(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model).float(), logits(full), rtol=0.1, atol=0.1)
    assert load(folder).dtype == torch.bfloat16
    dense = load(decompress(folder, tmp_path / "dense"))
    assert {t.dtype for t in dense.state_dict().values()} == {torch.bfloat16}


def test_casting_a_loaded_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    model = load(folder)
    before = {n: t.clone() for n, t in model.state_dict().items() if "norm" not in n}
    model.to(torch.bfloat16)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_and_shards(tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    folder = write_tiny(tmp_path / "model", tiny_model("llama"), shard_bytes=2500)
    assert len(list(folder.glob("*.safetensors"))) == 3
    model = load(folder, device_map=device_map)
    assert torch.equal(logits(model), logits(load(folder)))
    model.save_pretrained(tmp_path / "again", max_shard_size=2500)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    open_checkpoint(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)


def test_generate(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    dense = load(decompress(folder, tmp_path / "dense"))
    settings = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    expected = dense.generate(tokens(), **settings)
    assert torch.equal(load(folder).generate(tokens(), **settings), expected)


def test_other_heads(tmp_path: Path) -> None:
    """The base model and a model with another head load what they have."""
    folder = write_tiny(tmp_path / "model", tiny_model("llama"))
    whole = load(folder)
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = whole.model(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert_same_state(base, again)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(classifier.score) is nn.Linear
    assert isinstance(classifier.model.layers[0].mlp.up_proj, PocketLinear)


def test_compile(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", tiny_model("llama-tied")))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens(), use_cache=False).logits, logits(model), **CLOSE
        )


@pytest.mark.parametrize("storage", ["table-int8", "trellis"])
def test_install_in_memory(tmp_path: Path, storage: str) -> None:
    """A model compressed in memory is the one that is written and loaded."""
    for architecture in ("llama-tied", "gpt2"):
        folder = write_tiny(tmp_path / architecture, tiny_model(architecture), storage=storage)
        model = tiny_model(architecture)
        codecs, modules = tiny_models.random_compression(model, storage=storage)
        install_compressed(model, codecs, modules, {"seed": 3})
        assert torch.equal(logits(model), logits(load(folder)))
        model.save_pretrained(tmp_path / "saved" / architecture)
        again = load(tmp_path / "saved" / architecture)
        assert again.config.quantization_config.seed == 3
        assert_same_state(again, model)


@pytest.mark.parametrize(
    ("settings", "storage"),
    [({"subvector": 2, "codebook": 256, "epochs": 2}, "table-int8"), ({"bits": 4}, "trellis")],
)
def test_compress_while_loading(tmp_path: Path, settings: dict[str, Any], storage: str) -> None:
    """from_pretrained(dense, quantization_config=PocketConfig(...)) compresses in memory."""
    original = tiny_model("llama-tied")
    original.save_pretrained(tmp_path / "dense")
    config = PocketConfig(**settings, embeddings=True)
    model = load(tmp_path / "dense", quantization_config=config)
    assert isinstance(model.model.layers[1].mlp.down_proj, PocketLinear)
    assert model.model.layers[1].mlp.down_proj.codec.spec.storage == storage
    assert isinstance(model.lm_head, PocketTiedLinear)
    weight = original.model.layers[1].mlp.down_proj.weight
    packed = model.model.layers[1].mlp.down_proj.dequantize()
    assert (packed - weight).norm() < 0.25 * weight.norm()
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))


def test_calibration_while_loading_needs_a_folder(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("text")
    config = PocketConfig(subvector=2, codebook=16, calibration=str(text))
    model = tiny_model("llama")
    with pytest.raises(PocketError, match="needs a model loaded from a folder"):
        compress_in_memory(model, config)


# ---- adapters ---------------------------------------------------------------------------------


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), settings)
    packed = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    before = logits(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(logits(model), before)
    for name, tensor in packed.items():
        assert torch.equal(model.state_dict()[name], tensor)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model))

    # Packed weights cannot take up an adapter; dense ones can.
    adapted = logits(again)
    again.get_base_model().dequantize()
    merged = again.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(merged), adapted, **CLOSE)


# ---- what must fail ---------------------------------------------------------------------------


def test_damage_is_found_before_loading(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_checksums_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_tiny(tmp_path / "small", tiny_model("llama"))
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    tensor = open_checkpoint(out).tensors["model.norm.weight"]
    content[tensor.start] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv("POCKETLLM_CHECKSUMS", "0")
    AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.setenv("POCKETLLM_CHECKSUMS", "1")
    with pytest.raises(CheckpointError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="tells where memory comes from")
def test_packed_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    """Mapped, not copied: the process need not have read them."""
    out = write_tiny(tmp_path / "small", tiny_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(out)
    packed = [m.weight.data_ptr() for m in model.modules() if isinstance(m, PocketLinear)]
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(out / "model.safetensors")):
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    assert packed and all(any(low <= at < high for low, high in mapped) for at in packed)


def test_version_is_checked_before_loading(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version is 99"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 56}, r"down_proj the shape \[36, 52\], the model's is \[36, 56\]"),
        ({"num_hidden_layers": 1}, "names the module model.layers.1.*lacks"),
    ],
)
def test_model_of_another_shape(tmp_path: Path, change: dict[str, int], message: str) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def python(code: str, *, hidden: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter; with ``hidden``, as if this package were not installed."""
    if hidden:
        hide = (
            "import importlib.metadata as m, sys\n"
            "class Hide:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] == 'pocketllm': raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, Hide())\n"
        )
        code, environment = hide + code, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment}
    path = "" if hidden else str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=300,
    )


LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
print("LOADED", type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_without_the_package_loading_fails(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    result = python(LOAD.format(folder=str(folder)), hidden=True)
    assert result.returncode != 0 and "LOADED" not in result.stdout
    assert "ckpt" in result.stderr or "mismatch" in result.stderr.lower()


def test_importing_the_package_is_enough(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    code = "import pocketllm\n" + LOAD.format(folder=str(folder))
    result = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.strip() == "LOADED PocketLinear", result.stderr


def test_entry_point_is_enough(tmp_path: Path) -> None:
    """Needs the package installed, editable or not."""
    from importlib.metadata import entry_points

    points = [p for p in entry_points(group="torch.backends") if p.name == "pocketllm"]
    if not points:
        pytest.skip("pocketllm is not installed, so it has no entry point")
    folder = write_tiny(tmp_path / "model", tiny_model("llama-tied"))
    result = python(LOAD.format(folder=str(folder)))
    assert result.stdout.strip() == "LOADED PocketLinear", result.stderr


def test_import_is_light() -> None:
    result = python(
        "import time, sys; start = time.process_time(); import pocketllm\n"
        "print(time.process_time() - start)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.15


def test_registering_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import pocketllm.hf

    def fail() -> None:
        raise RuntimeError("incompatible")

    monkeypatch.setattr(pocketllm.hf, "register", fail)
    with pytest.warns(UserWarning, match="cannot register .*: incompatible"):
        pocketllm._autoload.install()


def test_quantizer_says_what_it_can() -> None:
    quantizer = PocketQuantizer.__new__(PocketQuantizer)
    assert quantizer.is_serializable() and quantizer.is_trainable and quantizer.is_compileable
