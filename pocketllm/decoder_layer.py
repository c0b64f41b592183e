"""Decoder layers that take one token in one call of the kernels.

While text is generated, a layer sees one token at a time. Its products aside, that is seventy small
operators of PyTorch (norms, rotation, cache, attention, gate), which cost half a millisecond and
compute next to nothing, and the cache copies all keys and values to add one of each. Layers of
Llama, Mistral, Qwen2 and Qwen3 whose matrices are compressed do all of it in C. :func:`install`
gives such layers a subclass of their own class that does so for one token of one sequence on the
CPU, without gradients, and in every other case (several tokens or sequences, masks, other caches,
hooks, adapters, attention that is asked for) leaves the work to transformers. The model that has
the layers gets one too, which takes a token through all of them at once
(:mod:`pocketllm.decoder_stack`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import kernels, ops
from .decoder_cache import rooms_of
from .decoder_stack import OneTokenModel
from .linear import PocketLinear
from .one_token import FAMILIES, OneToken, Plan, Watch, class_of, may_take, take

# In the order of enum pllm_layer_part.
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def install(model: nn.Module) -> None:
    """Let the model and its decoder layers, where they are of a known kind, take single tokens in
    C."""
    for module in model.modules():
        kind = type(module)
        if kind.__module__ not in FAMILIES or issubclass(kind, OneToken):
            continue
        if kind.__name__.endswith("DecoderLayer"):
            module.__class__ = class_of(OneTokenLayer, kind)
        elif kind.__name__.endswith("Model") and "layers" in module._modules:
            module.__class__ = class_of(OneTokenModel, kind)


def uninstall(model: nn.Module) -> None:
    """Give the layers and the model their own classes back."""
    for module in model.modules():
        if isinstance(module, OneToken):
            module.__dict__.pop("_plan", None)
            module.__class__ = module.original


class OneTokenLayer(OneToken):
    """Mixed into a class of decoder layers by :func:`install`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own class: hidden states (batch, tokens, width) -> the same shape."""
        if (
            not args
            and ops.runs_directly(hidden_states)
            and hidden_states.shape[:2] == (1, 1)
            and may_take()
        ):
            made = self._one_token(hidden_states, **kwargs)
            if made is not None:
                return made
        return super().forward(hidden_states, *args, **kwargs)

    def _one_token(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> Tensor | None:
        """The layer's output for one token, or None where transformers has to do it."""
        if (
            attention_mask is not None
            or position_embeddings is None
            or output_attentions
            or self.training
        ):
            return None
        plan = self.planned()
        if plan is None:
            return None
        rooms = rooms_of(past_key_values, self.self_attn.layer_idx, plan.shapes)
        return None if rooms is None else take(plan, x, *position_embeddings, rooms)

    def make_plan(self) -> Plan | None:
        """The layer as the kernels take it; None where a part is not what they compute."""
        places = _places(self)
        parts = [inside.get(name) for inside, name in places]
        matrices, norms, (attention, mlp, activation) = parts[:7], parts[7:11], parts[11:]
        if not all(type(part) is PocketLinear for part in matrices):
            return None
        if any(type(part).__module__ not in FAMILIES for part in (*norms[:2], attention, mlp)):
            return None
        epsilons = {part.variance_epsilon for part in norms if part is not None}
        if (
            type(activation).__name__ not in ("SiLU", "SiLUActivation")
            or attention.config._attn_implementation not in ("sdpa", "eager")
            or (norms[2] is None) != (norms[3] is None)
            or len(epsilons) != 1
            or any("forward" in part.__dict__ for part in parts if part is not None)
        ):
            return None
        tensors = [part.bias for part in matrices]
        tensors += [None if part is None else part.weight for part in norms]
        if any(tensor is not None and not tensor.is_cpu for tensor in tensors):
            return None
        places += [(part.__dict__, "_codec") for part in matrices]
        modules = [part for part in parts if part is not None]
        watch = Watch(modules, list(dict.fromkeys(part.codec for part in matrices)), places)
        floats = [None if t is None else t.detach().float().contiguous().numpy() for t in tensors]
        head = attention.head_dim
        layer = kernels.hold_layer(
            tuple(part._arrays().held for part in matrices),
            tuple(floats[:7]),
            tuple(floats[7:]),
            head,
            epsilons.pop(),
            attention.scaling,
        )
        held, shape = kernels.hold_layers((layer,)), (matrices[1].out_features // head, head)
        return Plan(watch, (layer,), held, (shape,), matrices[0].in_features)


def _places(layer: nn.Module) -> list[tuple[Any, str]]:
    """Where the seven matrices are, the norms (those of heads may be missing), the rest."""
    inside = layer._modules
    attention, mlp = inside.get("self_attn"), inside.get("mlp")
    in_attention = attention._modules if attention is not None else {}
    in_mlp = mlp._modules if mlp is not None else {}
    return [
        *((in_attention, name) for name in _ATTENTION),
        *((in_mlp, name) for name in _MLP),
        (inside, "input_layernorm"),
        (inside, "post_attention_layernorm"),
        (in_attention, "q_norm"),
        (in_attention, "k_norm"),
        (inside, "self_attn"),
        (inside, "mlp"),
        (in_mlp, "act_fn"),
    ]
