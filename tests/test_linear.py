"""PocketLinear and PocketEmbedding against nn.Linear and nn.Embedding on the dequantised weight."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator

import independent_reader
import numpy as np
import pytest
import torch
from compressed import falling_bits, random_codec, random_module
from torch import Tensor, nn
from torch.nn import functional

from pocketllm import kernels, ops
from pocketllm.linear import (
    CodecBank,
    PocketEmbedding,
    PocketLinear,
    PocketTiedLinear,
)
from pocketllm.schema import codec_tensor, module_tensor

APART = "trellis, columns with bits of their own"
STORAGES = ["table-int8", "table-float16", "decoder", "trellis", APART]
# (out, in): smaller than a tile, in not a multiple of d, one row, one column, blocks of a trellis
SHAPES = [(64, 48), (37, 29), (1, 16), (5, 1), (130, 67), (20, 300)]
# Products are float32 sums in another order than PyTorch's.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fill(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copy arrays into buffers of the same name."""
    for name, array in arrays.items():
        getattr(module, name).copy_(torch.from_numpy(array))


def make(
    shape: tuple[int, int] = (37, 29),
    storage: str = "table-int8",
    *,
    scale: bool = True,
    shift: bool = False,
    bias: bool = True,
    embedding: bool = False,
    codebook: int = 60,
) -> tuple[PocketLinear | PocketEmbedding, Tensor]:
    """A module with random content and its dense weight by the independent reader."""
    norm = "rln" if storage == "decoder" else "input"
    codec = random_codec("c", 4, codebook, storage=storage.split(",")[0], norm=norm)
    bits = falling_bits(shape[1]) if storage == APART else 2.25
    data = random_module("m", shape, codec, scale=scale, shift=shift, spread=0.2, bits=bits)
    tensors = {codec_tensor("c", part): array for part, array in codec.parts.items()}
    tensors.update({module_tensor("m", part): array for part, array in data.parts.items()})
    entries = {"c": codec.spec.to_json()}
    dense = independent_reader.decode_module("m", data.spec.to_json(), entries, tensors)

    bank = CodecBank([codec.spec])
    fill(bank["c"], dict(codec.parts))
    rows, columns = shape
    if embedding:
        module: PocketLinear | PocketEmbedding = PocketEmbedding(
            rows, columns, bank["c"], scale=scale, shift=shift, bits=data.spec.bits
        )
    else:
        module = PocketLinear(
            columns, rows, bank["c"], bias=bias, scale=scale, shift=shift, bits=data.spec.bits
        )
        if bias:
            nn.init.normal_(module.bias)
    fill(module, data.parts)
    return module.eval(), torch.from_numpy(dense).float()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers for every test, and products without rounded activations."""
    torch.manual_seed(0)
    before = kernels.activations()
    kernels.set_activations("float32")
    yield
    kernels.set_activations(before)


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [False, True])
def test_forward(storage: str, shape: tuple[int, int], shift: bool) -> None:
    linear, dense = make(shape, storage, shift=shift)
    for lead in [(), (1,), (3,), (2, 5), (0,), (2, 0), (40,)]:
        x = torch.randn(*lead, shape[1])
        with torch.no_grad():
            result = linear(x)
        torch.testing.assert_close(result, functional.linear(x, dense, linear.bias), **CLOSE)


@pytest.mark.parametrize("shift", [False, True])
def test_forward_with_activations_as_integers(shift: bool) -> None:
    linear, dense = make((130, 67), shift=shift)
    kernels.set_activations("integer")
    x = torch.randn(5, 67)
    want = functional.linear(x, dense, linear.bias)
    step = x.abs().amax(1, keepdim=True) / 250
    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-7)):
        result = linear.to(dtype)(x.to(dtype)).float()
        bound = step * dense.abs().sum(1) + rounding * (want.abs() + x.abs() @ dense.abs().T)
        assert torch.all((result - want).abs() <= bound + 1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_without_scale_and_bias(storage: str) -> None:
    linear, dense = make(storage=storage, scale=False, bias=False)
    x = torch.randn(4, 29)
    torch.testing.assert_close(linear(x), functional.linear(x, dense), **CLOSE)
    assert set(linear.state_dict()) == {"weight"} | ({"columns"} if storage == APART else set())


@pytest.mark.parametrize("codebook", [2, 5, 300, 4096, 65536])
def test_index_widths(codebook: int) -> None:
    linear, dense = make(codebook=codebook, storage="table-float16")
    x = torch.randn(2, 29)
    torch.testing.assert_close(linear(x), functional.linear(x, dense, linear.bias), **CLOSE)
    torch.testing.assert_close(ops.matmul_torch(x, linear.matrix()), x @ dense.T, **CLOSE)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shift", [False, True])
def test_pytorch_path_equals_the_kernels(storage: str, shift: bool) -> None:
    linear, dense = make((130, 67), storage, shift=shift)
    matrix = linear.matrix()
    rows = torch.tensor([129, 0, 7, 7])
    torch.testing.assert_close(ops.decode_rows_torch(matrix, rows), dense[rows], **CLOSE)
    x = torch.randn(6, 67)
    torch.testing.assert_close(ops.matmul_torch(x, matrix, linear.bias), linear(x), **CLOSE)


def test_pytorch_path_works_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, dense = make((130, 67))
    monkeypatch.setattr(ops, "TILE_WEIGHTS_CPU", 67 * 9)
    x = torch.randn(6, 67)
    expected = functional.linear(x, dense, linear.bias)
    torch.testing.assert_close(ops.matmul_torch(x, linear.matrix(), linear.bias), expected, **CLOSE)
    torch.testing.assert_close(linear.dequantize(), dense, **CLOSE)


@pytest.mark.parametrize("norm", ["input", "ln", "rln"])
def test_decoder_norms(norm: str) -> None:
    codec = random_codec("c", 3, 32, storage="decoder", norm=norm)
    data = random_module("m", (6, 10), codec)
    bank = CodecBank([codec.spec])
    fill(bank["c"], dict(codec.parts))
    linear = PocketLinear(10, 6, bank["c"])
    fill(linear, {"weight": data.packed, "scale": data.scale})
    rows = torch.arange(6)
    torch.testing.assert_close(
        ops.decode_rows_torch(linear.matrix(), rows), linear.dequantize(), **CLOSE
    )


def test_dequantize() -> None:
    linear, dense = make()
    torch.testing.assert_close(linear.dequantize(), dense, **CLOSE)
    torch.testing.assert_close(linear.dequantize(torch.bfloat16), dense.bfloat16())


# ---- dtypes, autocast, casts ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    linear, dense = make()
    x = torch.randn(3, 29).to(dtype)
    result = linear(x)
    assert result.dtype == dtype
    expected = functional.linear(x.float(), dense, linear.bias).to(dtype)
    # Product and bias are each rounded to the dtype, so errors follow the largest of them.
    largest = functional.linear(x.float(), dense).abs().max() + linear.bias.abs().max()
    tolerance = 2 * max(torch.finfo(dtype).eps, 2**-20) * largest.item()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def test_autocast() -> None:
    linear, dense = make()
    x = torch.randn(3, 29)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear(x)
        like = nn.Linear(29, 37)(x)
    assert result.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(
        result.float(), functional.linear(x, dense, linear.bias), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("storage", ["table-int8", APART])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_the_stored_tensors_alone(cast: str, storage: str) -> None:
    linear, _ = make(storage=storage, shift=True)
    bank = CodecBank([])
    bank.add_module("c", linear.codec)
    model = nn.ModuleDict({"layer": linear, "bank": bank})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    getattr(model, cast)()
    for name, tensor in model.state_dict().items():
        if name == "layer.bias":
            assert tensor.dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_empty_to_and_meta() -> None:
    linear, _ = make()
    meta = copy.deepcopy(linear).to("meta")
    assert meta.weight.is_meta and meta.scale.is_meta and meta.scale.dtype == torch.uint8
    real = meta.to_empty(device="cpu")
    assert real.weight.shape == linear.weight.shape and not real.scale.is_meta
    assert meta.bias.shape == linear.bias.shape
    x = torch.randn(2, 29, device="meta")
    assert copy.deepcopy(linear).to("meta")(x).shape == (2, 37)


# ---- state, copies ----------------------------------------------------------------------------


def test_state_dict_has_the_names_of_the_format() -> None:
    linear, _ = make(shift=True)
    assert set(linear.state_dict()) == {"weight", "scale", "shift", "bias"}
    assert linear.weight.dtype == torch.uint8 and linear.weight.ndim == 1
    assert isinstance(linear, nn.Linear) and not list(linear.children())
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


@pytest.mark.parametrize("storage", ["table-int8", APART])
def test_copies_and_pickles(storage: str) -> None:
    linear, _ = make(storage=storage)
    x = torch.randn(2, 29)
    model = nn.ModuleDict({"layer": linear, "bank": CodecBank([])})
    model["bank"].add_module("c", linear.codec)
    twin = copy.deepcopy(model)
    assert twin["layer"].codec is twin["bank"]["c"] and twin["layer"].codec is not linear.codec
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other["layer"](x), linear(x))
    levels = "table" if storage == "table-int8" else "magnitude"
    getattr(twin["bank"]["c"], levels).zero_()
    assert torch.equal(twin["layer"](x), twin["layer"].bias.expand(2, -1))
    assert not torch.equal(linear(x), linear.bias.expand(2, -1))


def test_changed_tensors_are_seen() -> None:
    linear, dense = make()
    x = torch.randn(2, 29)
    linear(x)
    with torch.no_grad():
        linear.scale[0] += 1  # the exponent they share
    torch.testing.assert_close(linear(x), functional.linear(x, 2 * dense, linear.bias), **CLOSE)
    other, dense = make((37, 29), shift=True)
    linear.load_state_dict({**linear.state_dict(), "weight": other.weight.flip(0)}, assign=True)
    torch.testing.assert_close(
        linear(x), functional.linear(x, linear.dequantize(), linear.bias), **CLOSE
    )


@pytest.mark.parametrize("name", ["columns", "magnitude", "magnitude_scale"])
def test_changed_tensors_of_a_trellis_are_seen(name: str) -> None:
    linear, _ = make(storage=APART)
    x = torch.randn(2, 29)
    before = linear(x)
    with torch.no_grad():
        if name == "columns":
            linear.columns += 8 * 4 * (linear.columns < 8 * 28)  # half the scale
        else:
            getattr(linear.codec, name).copy_(getattr(linear.codec, name) / 2)
    after = linear(x)
    torch.testing.assert_close(
        after, functional.linear(x, linear.dequantize(), linear.bias), **CLOSE
    )
    assert not torch.allclose(after, before, rtol=0.05)


def test_caches_do_not_outlive_the_module() -> None:
    gc.collect()
    matrices, codecs = len(ops._matrices._entries), len(ops._codecs._entries)
    linear, _ = make()
    linear(torch.randn(1, 29))
    assert len(ops._matrices._entries) == matrices + 1
    del linear
    gc.collect()
    assert (len(ops._matrices._entries), len(ops._codecs._entries)) == (matrices, codecs)


def test_inference_mode() -> None:
    with torch.inference_mode():
        linear, dense = make()
        x = torch.randn(2, 29)
        torch.testing.assert_close(linear(x), functional.linear(x, dense, linear.bias), **CLOSE)


# ---- gradients, compile -----------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(storage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TILE_WEIGHTS_CPU", 29 * 10)
    linear, dense = make(storage=storage, shift=True)
    x = torch.randn(2, 3, 29, dtype=dtype, requires_grad=True)
    mirror = x.detach().float().clone().requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    out = linear(x)
    assert out.dtype == dtype
    seed = torch.randn(2, 3, 37)
    out.backward(seed.to(dtype))
    functional.linear(mirror, dense, bias).backward(seed.to(dtype).float())
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(x.grad.float(), mirror.grad, **close)
    torch.testing.assert_close(linear.bias.grad, bias.grad, **close)


def test_bias_alone_gets_its_gradient() -> None:
    linear, _ = make()
    linear(torch.randn(4, 29)).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((37,), 4.0))


@pytest.mark.parametrize("storage", ["table-int8", APART])
def test_operators_keep_their_contracts(storage: str) -> None:
    linear, _ = make((6, 9), storage, shift=True)
    x = torch.randn(3, 9, requires_grad=True)
    matrix = linear.matrix()
    torch.library.opcheck(torch.ops.pocketllm.matmul, (x, linear.bias.detach(), *matrix))
    torch.library.opcheck(torch.ops.pocketllm.matmul_transposed, (torch.randn(3, 6), *matrix))
    torch.library.opcheck(torch.ops.pocketllm.embedding, (torch.tensor([0, 5]), *matrix))


@pytest.mark.parametrize("storage", ["table-int8", "decoder", APART])
def test_compile(storage: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, _ = make((50, 29), storage, embedding=True)
            self.linear, _ = make((29, 29), storage)

        def forward(self, index: Tensor) -> Tensor:
            return functional.gelu(self.linear(self.embedding(index)))

    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 5):
        index = torch.randint(0, 50, (2, count))
        torch.testing.assert_close(compiled(index), block(index))
    wrapped = torch.compile(block.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    x, y = (torch.ones(4, 29, requires_grad=True) for _ in range(2))
    wrapped(x).square().sum().backward()
    block.linear(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


# ---- embeddings and tied heads ----------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_embedding(storage: str) -> None:
    embedding, dense = make((50, 29), storage, embedding=True, shift=True)
    for index in (torch.randint(0, 50, (3, 4)), torch.tensor(7), torch.empty(0, dtype=torch.long)):
        torch.testing.assert_close(embedding(index), dense[index], **CLOSE)
    torch.testing.assert_close(embedding(torch.tensor([1], dtype=torch.int32)), dense[[1]], **CLOSE)
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]))


def test_embedding_follows_casts() -> None:
    embedding, dense = make((50, 29), embedding=True)
    assert embedding.to(torch.bfloat16)(torch.tensor([3])).dtype == torch.bfloat16
    assert embedding.scale.dtype == torch.uint8
    embedding.float()
    embedding.multiplier = 3.0
    torch.testing.assert_close(embedding(torch.tensor([3])), 3 * dense[[3]], **CLOSE)


def test_tied_head_reads_the_embedding() -> None:
    embedding, dense = make((50, 29), embedding=True)
    head = PocketTiedLinear(embedding)
    x = torch.randn(3, 29)
    torch.testing.assert_close(head(x), x @ dense.T, **CLOSE)
    assert head.state_dict() == {} and head.weight is embedding.weight
    torch.testing.assert_close(head.dequantize(), dense, **CLOSE)
    assert isinstance(head, PocketLinear)
    model = copy.deepcopy(nn.ModuleDict({"embedding": embedding, "head": head}))
    assert model["head"].weight is model["embedding"].weight
    assert "codec=c" in repr(model) and "29" in repr(model)
