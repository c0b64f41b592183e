"""One token through all layers in one call, against transformers' loop over the same layers."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counter
from single_tokens import begun, compressed, difference, layer_by_layer, logits_of, plain, read
from tiny_models import tiny_model, tokens, write_tiny
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from pocketllm import decoder_cache, decoder_layer, kernels
from pocketllm.decoder_stack import OneTokenModel

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def caches_are_equal(a: DynamicCache, b: DynamicCache) -> bool:
    """Bit for bit."""
    return len(a.layers) == len(b.layers) and all(
        torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        for mine, theirs in zip(a.layers, b.layers, strict=True)
    )


@pytest.mark.parametrize("storage", ["table-int8", "trellis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_gives_what_the_layers_give_one_by_one(
    architecture: str,
    dtype: torch.dtype,
    storage: str,
    counter: Counter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_cache, "_SPARE", 2)
    model, ids = compressed(architecture, dtype, storage), tokens(16, 1)
    caches = [begun(each, ids[:, :7]) for each in (model, layer_by_layer(model))]
    counter.calls = counter.layers = 0
    got = read(model, ids[:, 7:], caches[0])
    assert (counter.calls, counter.layers) == (9, 9 * 2)
    want = read(layer_by_layer(model), ids[:, 7:], caches[1])
    assert (counter.calls, counter.layers) == (9 + 9 * 2, 9 * 2 + 9 * 2)
    assert torch.equal(got, want)
    assert caches[0].get_seq_length() == 16
    assert caches_are_equal(*caches)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_gives_what_the_model_of_transformers_gives(architecture: str, exact: None) -> None:
    model, found = compressed(architecture), []
    for each in (model, plain(model)):
        inner, cache = each.model, begun(each, tokens(6, 1))
        with torch.inference_mode():
            out = inner(tokens(1, 1), past_key_values=cache)
        assert type(out) is BaseModelOutputWithPast
        assert out.past_key_values is cache
        assert list(out) == ["last_hidden_state", "past_key_values"]
        found.append(out.last_hidden_state)
    assert difference(*found) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**GREEDY, "do_sample": True, "temperature": 3.0},
        {**GREEDY, "num_beams": 2},
        {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True},
        {**GREEDY, "attention_mask": torch.ones(1, 6, dtype=torch.long)},
    ],
    ids=["greedy", "sampled", "beams", "hidden-states", "mask"],
)
def test_generate_writes_the_same(options: dict[str, Any], counter: Counter, exact: None) -> None:
    model, found = compressed(), []
    for each in (model, layer_by_layer(model), plain(model)):
        torch.manual_seed(0)
        out = each.generate(tokens(6, 1), **options)
        found.append(out if isinstance(out, Tensor) else out.sequences)
        if each is model:
            stacked = counter.layers - counter.calls
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    together = "num_beams" not in options and "output_hidden_states" not in options
    assert stacked == (5 if together else 0)


def test_a_mask_of_ones_and_positions_are_taken(counter: Counter) -> None:
    model, found = compressed(), []
    for each in (model, layer_by_layer(model)):
        cache = begun(each, tokens(6, 1))
        with torch.inference_mode():
            found.append(
                each(
                    tokens(1, 1),
                    past_key_values=cache,
                    attention_mask=torch.ones(1, 7),
                    position_ids=torch.tensor([[11]]),
                ).logits
            )
    assert counter.layers - counter.calls == 3 + 1
    assert torch.equal(*found)
    other = read(model, tokens(1, 1), begun(model, tokens(6, 1)))
    assert not torch.equal(found[0], other)  # positions matter


# ---- what is left to transformers --------------------------------------------------------------


def _padded(length: int) -> Tensor:
    return torch.tensor([[0, 0] + [1] * (length - 2)])


STEPS_ASIDE: dict[str, dict[str, Any]] = {
    "left-padded": {"attention_mask": _padded(7)},
    "a hole": {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1]])},
    "a mask too long": {"attention_mask": torch.ones(1, 9)},
    "a mask too short": {"attention_mask": torch.ones(1, 5)},
    "four dimensions": {"attention_mask": torch.zeros(1, 1, 1, 7)},
    "hidden states": {"output_hidden_states": True},
    "some hidden states": {"output_hidden_states": [1]},
    "not causal": {"is_causal": False},
    "no cache wanted": {"use_cache": False},
}


@pytest.mark.parametrize("options", STEPS_ASIDE.values(), ids=STEPS_ASIDE)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_steps_aside_for_what_is_asked(
    architecture: str, options: dict[str, Any], counter: Counter
) -> None:
    model, found = compressed(architecture), []
    caches = [begun(each, tokens(6, 1)) for each in (model, layer_by_layer(model))]
    counter.calls = counter.layers = 0
    for each, cache in zip((model, layer_by_layer(model)), caches, strict=True):
        with torch.inference_mode():
            found.append(each.model(tokens(1, 1), past_key_values=cache, **options))
        assert counter.layers == counter.calls  # none takes both layers
    assert list(found[0]) == list(found[1])
    assert torch.equal(found[0].last_hidden_state, found[1].last_hidden_state)
    assert caches_are_equal(*caches)
    if "output_hidden_states" in options:
        pairs = zip(found[0].hidden_states, found[1].hidden_states, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if a is not None or b is not None)


def test_steps_aside_for_tuples_masks_by_kind_and_embeddings(counter: Counter) -> None:
    model = compressed("qwen2")
    cache = begun(model, tokens(6, 1))
    want = begun(model, tokens(6, 1))
    expected = [read(model, tokens(1, 1), want) for _ in range(3)]
    counter.calls = counter.layers = 0
    with torch.inference_mode():
        kinds = {"full_attention": None}
        found = [
            model.model(tokens(1, 1), past_key_values=cache, return_dict=False)[0],
            model.model(tokens(1, 1), past_key_values=cache, attention_mask=kinds)[0],
            model.model(
                inputs_embeds=model.model.embed_tokens(tokens(1, 1)), past_key_values=cache
            )[0],
        ]
        found = [model.lm_head(states) for states in found]
    assert (counter.calls, counter.layers) == (6, 6)
    assert torch.equal(torch.cat(found), torch.cat(expected))
    with pytest.raises(ValueError, match="exactly one of"):
        model.model(past_key_values=cache)


def _sets(**settings: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, value in settings.items():
            setattr(model.config, name, value)

    return change


def _has_layers_of(kind: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.config.layer_types = ["full_attention", kind]
        model.config.sliding_window = 3
        model.model.has_sliding_layers = True

    return change


def _drops(model: nn.Module) -> None:
    del model.model.layers[1]


def _swaps(model: nn.Module) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _uninstalls_one(model: nn.Module) -> None:
    decoder_layer.uninstall(model.model.layers[1])


def _forwards(model: nn.Module) -> None:
    layer = model.model.layers[0]
    whole = layer.forward
    layer.forward = lambda *arguments, **options: 2 * whole(*arguments, **options)


def _trains(part: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(part).training = True

    return change


def _relists(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList([copy.deepcopy(layer) for layer in model.model.layers][:1])


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "eager": ("llama", lambda model: model.set_attn_implementation("eager")),
    "hidden states wanted": ("llama", _sets(output_hidden_states=True)),
    "a window": ("mistral", _sets(sliding_window=3)),
    "a window in one layer": ("qwen2", _has_layers_of("sliding_attention")),
    "a layer taken away": ("llama", _drops),
    "another list": ("llama", _relists),
    "layers swapped": ("llama", _swaps),
    "a layer of transformers": ("llama", _uninstalls_one),
    "another forward": ("llama", _forwards),
    "a layer in training": ("llama", _trains("model.layers.1")),
    "attention in training": ("llama", _trains("model.layers.1.self_attn")),
    "the model in training": ("llama", _trains("model")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_tokens_is_seen(change: str, counter: Counter) -> None:
    architecture, make = CHANGES[change]
    model, ids, found = compressed(architecture), tokens(12, 1), []
    for each in (model, layer_by_layer(model)):
        cache = DynamicCache()
        with torch.inference_mode():
            each(ids[:, :6], past_key_values=cache)
        read(each, ids[:, 6:9], cache)
        assert counter.layers - counter.calls == 3  # of the model itself
        make(each)
        found.append(read(each, ids[:, 9:], cache))
        assert counter.layers - counter.calls == 3
    assert torch.equal(*found)


def test_fewer_and_more_layers_are_used_where_the_configuration_says_so(counter: Counter) -> None:
    model = compressed()
    want = logits_of(model, tokens(9, 1))
    model.config.num_hidden_layers = 1
    short = logits_of(model, tokens(9, 1))
    assert torch.equal(short, logits_of(layer_by_layer(model), tokens(9, 1)))
    assert not torch.equal(short, want)
    model.config.num_hidden_layers = 2
    assert torch.equal(logits_of(model, tokens(9, 1)), want)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    assert torch.equal(logits_of(model, tokens(9, 1)), want)
    assert (counter.calls, counter.layers) == (5 * 5, 5 * (2 + 1 + 1 + 2 + 2))
    second = model.model.layers[1]
    del model.model.layers[1:]
    assert torch.equal(logits_of(model, tokens(9, 1)), short)
    model.model.layers.append(second)
    assert torch.equal(logits_of(model, tokens(9, 1)), want)


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm", "model.rotary_emb"])
def test_replaced_and_followed_parts_around_the_layers_are_heard(
    part: str, counter: Counter
) -> None:
    model, seen = compressed(), []
    before = logits_of(model, tokens(9, 1))
    handle = model.get_submodule(part).register_forward_hook(lambda *a: seen.append(a))
    assert torch.equal(logits_of(model, tokens(9, 1)), before)
    handle.remove()
    assert len(seen) == 6
    other = copy.deepcopy(model.get_submodule(part))
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data = tensor.flip(0) * 2
    model.set_submodule(part, other)
    got = logits_of(model, tokens(9, 1))
    assert counter.layers - counter.calls == 3 * 5
    assert not torch.equal(got, before)
    assert torch.equal(got, logits_of(layer_by_layer(model), tokens(9, 1)))


def test_a_hook_on_any_part_of_a_layer_is_called() -> None:
    model = compressed("qwen3")
    before = logits_of(model, tokens(9, 1))
    layer = model.model.layers[1]
    parts = [name for name, module in layer.named_modules() if type(module) is not nn.Identity]
    assert len(parts) == 15
    for name in parts:
        seen: list[Any] = []
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            follow = lambda *arguments: seen.append(arguments[0])  # noqa: B023, E731
            handle = getattr(layer.get_submodule(name), register)(follow)
            logits_of(model, tokens(9, 1))
            handle.remove()
        assert len(seen) == 2 * 6, name
    assert torch.equal(logits_of(model, tokens(9, 1)), before)


def test_hooks_on_the_model_and_on_all_modules_are_called(counter: Counter) -> None:
    model, seen = compressed(), []
    handle = model.model.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    logits_of(model, tokens(9, 1))
    handle.remove()
    assert len(seen) == 6
    assert counter.layers - counter.calls == 5
    handle = torch_module.register_module_forward_hook(lambda *a: seen.append(a[0]))
    try:
        logits_of(model, tokens(9, 1))
    finally:
        handle.remove()
    assert counter.layers - counter.calls == 5
    assert sum(module is model.model.layers[1].mlp.act_fn for module in seen) == 6


def test_steps_aside_for_gradients_and_autocast(counter: Counter) -> None:
    model = compressed()
    caches = [begun(model, tokens(6, 1)) for _ in range(3)]
    counter.calls = counter.layers = 0
    loss = model(tokens(1, 1), past_key_values=caches[0]).logits.square().sum()
    loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got = model(tokens(1, 1), past_key_values=caches[1]).logits
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        want = layer_by_layer(model)(tokens(1, 1), past_key_values=caches[2]).logits
    assert torch.equal(got, want)
    assert counter.calls == 0


def test_caches_that_do_not_fit_are_left_to_transformers(counter: Counter) -> None:
    model = compressed()
    empty, uneven = DynamicCache(), begun(model, tokens(6, 1))
    other = begun(model, tokens(5, 1))
    uneven.layers[1] = other.layers[1]
    for cache in (empty, uneven):
        want = copy.deepcopy(cache)
        counter.calls = counter.layers = 0
        got = read(model, tokens(1, 1), cache)
        assert counter.layers == counter.calls
        assert torch.equal(got, read(layer_by_layer(model), tokens(1, 1), want))
        assert caches_are_equal(cache, want)
    static = model.generate(tokens(6, 1), cache_implementation="static", **GREEDY)
    assert counter.layers == counter.calls
    assert torch.equal(static, model.generate(tokens(6, 1), **GREEDY))


# ---- the cache ---------------------------------------------------------------------------------


def test_layers_called_by_themselves_in_between_use_the_same_cache() -> None:
    model, ids = compressed(), tokens(14, 1)
    want = read(model, ids[:, 8:], begun(model, ids[:, :8]))
    cache, found = begun(model, ids[:, :8]), []
    memory = set()
    for i, each in enumerate((model, layer_by_layer(model)) * 3):
        found.append(read(each, ids[:, 8 + i : 9 + i], cache))
        memory.add(cache.layers[0].keys.data_ptr())
    assert torch.equal(torch.cat(found, 1), want)
    assert len(memory) == 1  # nothing was copied


def test_memory_that_a_cache_grew_out_of_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_cache, "_SPARE", 2)
    model, ids = compressed(), tokens(24, 1)
    cache = begun(layer_by_layer(model), ids[:, :6])
    first = [weakref.ref(decoder_cache._rooms[layer]) for layer in cache.layers]
    read(model, ids[:, 6:15], cache)
    second = [weakref.ref(decoder_cache._rooms[layer]) for layer in cache.layers]
    read(layer_by_layer(model), ids[:, 15:], cache)
    assert all(room() is None for room in (*first, *second))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_state_put_back_does_not_overwrite_a_later_one(one_by_one: bool) -> None:
    model, ids = compressed(), tokens(12, 1)
    others = (ids + 1) % model.config.vocab_size
    cache = begun(model, ids[:, :8])
    states = [(layer, layer.keys, layer.values) for layer in cache.layers]
    want = read(model, others[:, 8:9], copy.deepcopy(cache))
    read(layer_by_layer(model) if one_by_one else model, ids[:, 8:9], cache)
    later = [layer.keys for layer in cache.layers]
    kept = [keys.clone() for keys in later]
    for layer, keys, values in states:
        layer.keys, layer.values = keys, values
    assert torch.equal(read(model, others[:, 8:9], cache), want)
    assert all(map(torch.equal, later, kept))


def test_a_reordered_cache_goes_on(counter: Counter) -> None:
    model, ids = compressed(), tokens(12, 1)
    want = read(model, ids[:, 8:], begun(model, ids[:, :8]))
    cache = begun(model, ids[:, :8])
    for layer in cache.layers:
        layer.reorder_cache(torch.tensor([0]))
    assert torch.equal(read(model, ids[:, 8:], cache), want)
    assert counter.layers == 2 * counter.calls


def test_an_error_in_the_kernel_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = compressed(), tokens(12, 1)
    want = read(model, ids[:, 8:], begun(model, ids[:, :8]))
    cache, take = begun(model, ids[:, :8]), kernels.token_at

    def fails(*arguments: Any) -> None:
        take(*arguments)
        raise MemoryError

    monkeypatch.setattr(kernels, "token_at", fails)
    with pytest.raises(MemoryError):
        read(model, (ids[:, 8:9] + 1) % 50, cache)
    monkeypatch.setattr(kernels, "token_at", take)
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]
    assert torch.equal(read(model, ids[:, 8:], cache), want)


def _interrupted(function: Callable[[], Any], inside: str, at: int) -> bool:
    """Calls with an interrupt before instruction ``at`` of a function and what it calls; whether it
    came so far."""
    left = at

    def follow(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if inside not in (frame.f_code.co_name, frame.f_back.f_code.co_name):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return follow

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 wants it of a frame before
    sys.settrace(follow)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_leaves_all_layers_at_the_same_token() -> None:
    model, ids = compressed(), tokens(12, 1)
    start = begun(model, ids[:, :8])
    want = read(model, ids[:, 8:], copy.deepcopy(start))
    lengths, at, goes_on = [], 0, True
    while goes_on:
        cache = copy.deepcopy(start)
        read(model, ids[:, 8:9], cache)
        goes_on = _interrupted(lambda: read(model, ids[:, 9:10], cache), "show_token", at)  # noqa: B023
        found = {layer.get_seq_length() for layer in cache.layers}
        assert len(found) == 1, at
        (length,) = found
        lengths.append(length)
        assert torch.equal(read(model, ids[:, length:], cache), want[:, length - 8 :]), at
        at += 1
    assert lengths == sorted(lengths)
    assert {9, 10} == set(lengths[:-1])  # interrupts came before and after


# ---- the module --------------------------------------------------------------------------------


def test_several_threads_generate_with_one_model() -> None:
    model = compressed()
    prompts = [(tokens(6, 1) + i) % 50 for i in range(4)]
    want = [model.generate(prompt, **GREEDY) for prompt in prompts]
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = model.generate(prompts[i], **GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got is not None and torch.equal(got, w) for got, w in zip(found, want, strict=True))


def test_its_name_and_arguments_are_those_of_transformers() -> None:
    kind, original = type(compressed().model), type(tiny_model("llama").model)
    assert str(kind) == str(original)
    assert issubclass(kind, original) and issubclass(kind, OneTokenModel)
    want = inspect.signature(original.forward).parameters
    assert list(inspect.signature(kind.forward).parameters) == list(want)


def test_a_model_without_a_head_is_saved_and_loaded(tmp_path: Path, counter: Counter) -> None:
    folder = write_tiny(tmp_path / "out", tiny_model("llama"), embeddings=False)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    inner = AutoModel.from_pretrained(folder).eval()
    whole.save_pretrained(tmp_path / "again")
    assert "OneToken" not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    found = []
    for each in (whole.model, inner, again.model, copy.deepcopy(inner)):
        cache = DynamicCache(config=each.config)
        with torch.inference_mode():
            each(tokens(6, 1), past_key_values=cache)
            counter.calls = 0
            found.append(each(tokens(1, 1), past_key_values=cache).last_hidden_state)
        assert counter.calls == 1
    assert all(torch.equal(states, found[0]) for states in found)


def test_uninstall_gives_everything_back() -> None:
    model = compressed()
    logits_of(model, tokens(9, 1))
    decoder_layer.uninstall(model)
    dense = tiny_model("llama")
    assert type(model.model) is type(dense.model)
    assert "_plan" not in model.model.__dict__
    assert [type(m) for m in model.model.layers] == [type(m) for m in dense.model.layers]


def test_layers_of_different_widths_are_refused() -> None:
    wide, narrow = compressed().model.layers[0], compressed().model.layers[0]
    held = [layer.planned().layers[0] for layer in (wide, narrow)]
    kernels.hold_layers(tuple(held))
    with pytest.raises(ValueError, match="layers: got 0"):
        kernels.hold_layers(())
    with pytest.raises(ValueError, match="rooms: want a tuple of 6"):
        kernels.token_at(kernels.hold_layers(tuple(held)), 0, False, 0, 0, (0, 0, 1), 0, 0)
    with pytest.raises(ValueError, match="room: got 4"):
        kernels.token_at(kernels.hold_layers((held[0],)), 0, False, 0, 0, (0, 0, 4), 4, 0)
