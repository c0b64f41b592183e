"""One token through a layer in C, against transformers' own layers over the same packed weights."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed import random_codec, random_module
from conftest import Counter
from single_tokens import begun, compressed, difference, logits_of, plain, read
from tiny_models import tiny_model, tokens, write_tiny
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from pocketllm import decoder_cache, decoder_layer, hf, kernels, ops
from pocketllm.linear import CodecBank, PocketLinear

ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("storage", ["table-int8", "trellis"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_what_transformers_gives(
    architecture: str, storage: str, counter: Counter, exact: None
) -> None:
    model = compressed(architecture, storage=storage)
    want = logits_of(plain(model), tokens(9, 1))
    assert counter.calls == 0
    got = logits_of(model, tokens(9, 1))
    assert counter.layers == 5 * 2  # tokens times layers
    assert difference(got, want) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bfloat16_is_closer_to_float32_than_transformers(
    architecture: str, counter: Counter
) -> None:
    model, precise = compressed(architecture, torch.bfloat16), compressed(architecture)
    precise.load_state_dict(model.state_dict())
    ids = tokens(9, 1)
    got, theirs = logits_of(model, ids), logits_of(plain(model), ids)
    assert counter.layers == 5 * 2
    want = logits_of(plain(precise), ids)
    assert (got - want).square().mean() < (theirs - want).square().mean()


def test_generate_writes_the_same_tokens(tmp_path: Path, counter: Counter, exact: None) -> None:
    folder = write_tiny(tmp_path / "out", tiny_model("llama"), embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    got = model.generate(tokens(6, 1), **options)
    assert counter.layers == 11 * 2
    want = plain(model).generate(tokens(6, 1), **options)
    assert torch.equal(got, want)


def test_threads_do_not_matter(counter: Counter) -> None:
    model, before = compressed("qwen3"), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(logits_of(model, tokens(9, 1)))
    torch.set_num_threads(before)
    assert counter.calls
    assert torch.equal(*found)


def test_the_cache_grows_as_that_of_transformers(
    counter: Counter, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_cache, "_SPARE", 2)
    model, ids = compressed(), tokens(24, 1)
    caches = begun(model, ids[:, :7]), begun(plain(model), ids[:, :7])
    found = [
        read(each, ids[:, 7:], cache)
        for each, cache in zip((model, plain(model)), caches, strict=True)
    ]
    assert difference(*found) < 1e-5
    assert counter.layers == 2 * 20
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.get_seq_length() == 24
        assert difference(ours.keys, theirs.keys) < 1e-5
        assert difference(ours.values, theirs.values) < 1e-5


def test_copies_of_a_cache_do_not_share_what_comes_later(counter: Counter) -> None:
    model, ids = compressed(), tokens(12, 1)
    others = (ids + 1) % model.config.vocab_size
    want = [read(model, each[:, 8:], begun(model, ids[:, :8])) for each in (ids, others)]
    cache = begun(model, ids[:, :8])
    shallow, deep = copy.copy(cache), copy.deepcopy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    runs = [(cache, ids, want[0]), (shallow, others, want[1]), (deep, ids, want[0])]
    for later, mine, _ in runs:  # turn by turn, so that one could write over another's
        read(model, mine[:, 8:9], later)
    for later, mine, expected in runs:
        assert torch.equal(read(model, mine[:, 9:], later), expected[:, 1:])


def test_a_cropped_cache_goes_on_from_there(counter: Counter) -> None:
    model, ids = compressed(), tokens(12, 1)
    want = read(model, ids[:, 8:], begun(model, ids[:, :8]))
    cache = begun(model, ids[:, :8])
    read(model, ids[:, :2], cache)
    before = [layer.keys for layer in cache.layers]
    kept = [keys.clone() for keys in before]
    cache.crop(-2)
    assert torch.equal(read(model, ids[:, 8:], cache), want)
    assert all(map(torch.equal, before, kept))


def test_several_tokens_in_between_are_heard(exact: None) -> None:
    model, ids = compressed(), tokens(14, 1)
    found = []
    for each in (model, plain(model)):
        cache = begun(each, ids[:, :8])
        with torch.inference_mode():
            middle = each(ids[:, 8:11], past_key_values=cache, use_cache=True).logits
        found.append(torch.cat([middle, read(each, ids[:, 11:], cache)], 1))
    assert difference(*found) < 1e-5


def test_a_cache_of_other_shapes_is_left_to_transformers(counter: Counter) -> None:
    model, ids = compressed(), tokens(8, 1)
    cache = begun(model, ids)
    counter.calls = 0
    with torch.inference_mode():
        cache.layers[0].values = cache.layers[0].values[..., :-1]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        read(model, ids[:, :1], cache)
    assert counter.calls == 0


def test_steps_aside_for_several_sequences_and_masks(counter: Counter) -> None:
    model = compressed()
    for ids, mask in ((tokens(6, 2), None), (tokens(6, 1), torch.tensor([[0, 0, 1, 1, 1, 1]]))):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        got = model.generate(ids, attention_mask=mask, **options)
        want = plain(model).generate(ids, attention_mask=mask, **options)
        assert torch.equal(got, want)
    assert counter.calls == 0


def test_steps_aside_for_a_static_cache_and_beams(counter: Counter) -> None:
    model = compressed()
    for options in ({"cache_implementation": "static"}, {"num_beams": 2}):
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
        want = plain(model).generate(tokens(6, 1), **settings)
        assert torch.equal(model.generate(tokens(6, 1), **settings), want)
    assert counter.calls == 0


def test_steps_aside_where_gradients_are_recorded(counter: Counter) -> None:
    model, cache = compressed(), DynamicCache()
    with torch.no_grad():
        model(tokens(4, 1), past_key_values=cache)
    loss = model(tokens(1, 1), past_key_values=cache).logits.square().sum()
    loss.backward()
    assert counter.calls == 0
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


def test_steps_aside_for_attentions_and_hooks(counter: Counter) -> None:
    model = compressed()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        cache = model(tokens(4, 1), use_cache=True).past_key_values
        out = model(tokens(1, 1), past_key_values=cache, output_attentions=True)
    assert [a.shape for a in out.attentions] == [(1, 2, 1, 5)] * 2
    assert counter.calls == 0

    model, seen = compressed(), []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, arguments, output: seen.append(output)
    )
    logits_of(model, tokens(9, 1))
    assert len(seen) == 1 + 5  # the prompt, then each token
    assert counter.calls == 5  # the other layer
    handle.remove()
    logits_of(model, tokens(9, 1))
    assert counter.layers == 5 + 5 * 2


def test_hidden_states_are_those_of_transformers(counter: Counter, exact: None) -> None:
    model = compressed()
    found = []
    for each in (model, plain(model)):
        with torch.inference_mode():
            cache = each(tokens(4, 1), use_cache=True).past_key_values
            out = each(tokens(1, 1), past_key_values=cache, output_hidden_states=True)
        found.append(torch.cat(out.hidden_states))
    assert counter.calls == 2
    logits_of(model, tokens(9, 1))  # the hooks that transformers left behind are idle
    assert counter.layers == 2 + 5 * 2
    assert difference(*found) < 1e-5


def test_an_adapter_is_heard(counter: Counter) -> None:
    from peft import LoraConfig, get_peft_model

    model = compressed()
    before = logits_of(model, tokens(9, 1))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    counter.calls = 0
    assert difference(logits_of(adapted, tokens(9, 1)), before) > 1e-3
    assert counter.calls == 0


@pytest.mark.parametrize(
    "name", ["input_layernorm.weight", "self_attn.q_proj.bias", "mlp.down_proj.scale"]
)
def test_changed_tensors_are_seen(name: str, counter: Counter, exact: None) -> None:
    model = compressed("qwen2")
    logits_of(model, tokens(9, 1))
    path, _, last = name.rpartition(".")
    tensor = getattr(model.model.layers[1].get_submodule(path), last)
    with torch.no_grad():
        if tensor.dtype == torch.uint8:
            tensor[5:9] = tensor[5:9].flip(0)
        else:
            tensor.mul_(1.5)
    want = logits_of(plain(model), tokens(9, 1))
    assert difference(logits_of(model, tokens(9, 1)), want) < 1e-5
    assert counter.layers == 2 * 5 * 2


def test_a_dense_matrix_in_the_layer_is_left_to_transformers(counter: Counter) -> None:
    model = compressed()
    layer = model.model.layers[0].self_attn
    dense = nn.Linear(layer.k_proj.in_features, layer.k_proj.out_features, bias=False)
    dense.weight = nn.Parameter(layer.k_proj.dequantize())
    layer.k_proj = dense
    logits_of(model, tokens(9, 1))
    assert counter.calls == 5


def test_copies_pickles_and_the_dense_model(counter: Counter) -> None:
    model = compressed()
    want = logits_of(model, tokens(9, 1))
    copied = copy.deepcopy(model)
    loaded = torch.load(io.BytesIO(_saved(model)), weights_only=False)
    for each in (copied, loaded, pickle.loads(pickle.dumps(model))):
        assert isinstance(each.model.layers[0], decoder_layer.OneTokenLayer)
        counter.layers = 0
        assert torch.equal(logits_of(each, tokens(9, 1)), want)
        assert counter.layers == 5 * 2
    kind = type(tiny_model("llama").model.layers[0])
    assert type(model.model.layers[0]).__name__ == kind.__name__
    assert type(hf.restore_dense(model).model.layers[0]) is kind


def _saved(model: nn.Module) -> bytes:
    memory = io.BytesIO()
    torch.save(model, memory)
    return memory.getvalue()


def _held(shapes: list[tuple[int, int]]) -> tuple[object, ...]:
    codec = random_codec("c", 4, 60)
    bank = CodecBank([codec.spec])
    held = []
    for rows, columns in shapes:
        data = random_module("m", (rows, columns), codec)
        module = PocketLinear(columns, rows, bank["c"])
        for part, array in {**codec.parts}.items():
            bank["c"].get_buffer(part).copy_(torch.from_numpy(array))
        module.weight.copy_(torch.from_numpy(data.packed))
        module.scale.copy_(torch.from_numpy(data.scale))
        held.append(ops.arrays_of(module.matrix()).held)
    return tuple(held)


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = [(16, 12), (8, 12), (8, 12), (12, 16), (20, 12), (20, 12), (12, 20)]
    none, ones = (None,) * 7, np.ones(12, np.float32)
    norms = (ones, ones, None, None)
    kernels.hold_layer(_held(good), none, norms, 4, 1e-6, 0.5)
    for i, wrong in ((1, (8, 16)), (2, (12, 12)), (3, (12, 8)), (5, (16, 12)), (6, (16, 20))):
        shapes = [*good[:i], wrong, *good[i + 1 :]]
        with pytest.raises(ValueError, match="not those of a decoder layer"):
            kernels.hold_layer(_held(shapes), none, norms, 4, 1e-6, 0.5)
    with pytest.raises(ValueError, match="not those of a decoder layer"):
        kernels.hold_layer(_held(good), none, norms, 3, 1e-6, 0.5)
    with pytest.raises(ValueError, match="head_norm: got"):
        kernels.hold_layer(_held(good), none, (ones, ones, ones, ones), 4, 1e-6, 0.5)
    with pytest.raises(ValueError, match="tuples of 7"):
        kernels.hold_layer(_held(good)[:6], none, norms, 4, 1e-6, 0.5)
