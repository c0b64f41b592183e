"""Models whose decoder layers take a single token in one call of the kernels for all of them.

With a call for each layer a model spends a tenth of a token's time between them, in Python: masks,
modules, checks, all of it out of the processor's caches since the last token, as the weights have
passed through them. Embedding, rotation and the last norm stay modules that are called. What asks
for anything else than the result (hidden states, a mask that hides something, a hook on a layer) is
left to transformers, whose loop then calls the layers one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import kernels, ops
from .decoder_cache import rooms_of
from .one_token import OneToken, Plan, Watch, may_take, take

# What else a caller may say, so long as it changes nothing.
_OPTIONS = {"return_dict", "output_hidden_states", "output_attentions"}
# What a model reads of its configuration.
_SETTINGS = (
    "_attn_implementation_internal",
    "_output_attentions",
    "output_hidden_states",
    "return_dict",
    "num_hidden_layers",
    "sliding_window",
    "layer_types",
    "is_causal",
)


class OneTokenModel(OneToken):
    """Mixed into a class of models by :func:`pocketllm.decoder_layer.install`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own class."""
        if (
            past_key_values is not None
            and inputs_embeds is None
            and _is_one(input_ids)
            and (position_ids is None or _is_one(position_ids))
            and (use_cache is True or (use_cache is None and self.config.use_cache))
            and _changes_nothing(kwargs)
            and not self.training
            and may_take()
        ):
            inputs_embeds, made = self._one_token(
                input_ids, attention_mask, position_ids, past_key_values
            )
            if made is not None:
                return BaseModelOutputWithPast(
                    last_hidden_state=self.norm(made), past_key_values=past_key_values
                )
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _one_token(
        self, token: Tensor, mask: Tensor | None, position: Tensor | None, past: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """The token's embedding and its hidden states behind the layers.

        None, None where transformers has to do it all; embedding, None where it has to do the rest.
        """
        plan = self.planned()
        rooms = None if plan is None else rooms_of(past, 0, plan.shapes)
        if plan is None or rooms is None or not _hides_nothing(mask, rooms.length + 1):
            return None, None
        x = self.embed_tokens(token)
        if not ops.runs_directly(x):
            return x, None
        if position is None:
            position = torch.tensor([[rooms.length]])
        cosine, sine = self.rotary_emb(x, position_ids=position)
        return x, take(plan, x, cosine, sine, rooms)

    def make_plan(self) -> Plan | None:
        """The layers as the kernels take them; None where they are not all of ours, or the
        configuration asks for more than their result."""
        config, layers = self.config, self._modules["layers"]
        if type(layers) is not nn.ModuleList or not _is_plain(config):
            return None
        used = list(layers[: config.num_hidden_layers])
        if not used or not all(map(_is_ours, used)):
            return None
        attentions = [layer.self_attn for layer in used]
        if any(layer.training for layer in (*used, *attentions)):
            return None
        if any(a.layer_idx != i or a.config is not config for i, a in enumerate(attentions)):
            return None
        plans = []
        for layer in used:
            plan = layer.planned()
            if plan is None:
                return None
            plans.append(plan)
        if len({(plan.width, plan.shapes[0][1]) for plan in plans}) != 1:
            return None
        places = [(self.__dict__, "config"), (self._modules, "layers")]
        places += [(config.__dict__, name) for name in _SETTINGS]
        places += [(layers._modules, str(i)) for i in range(config.num_hidden_layers)]
        places += [(layer.__dict__, name) for layer in used for name in ("_plan", "training")]
        places += [(a.__dict__, n) for a in attentions for n in ("layer_idx", "config", "training")]
        watch = Watch.of([plan.watch for plan in plans], used, places)
        held = tuple(layer for plan in plans for layer in plan.layers)
        shapes = tuple(shape for plan in plans for shape in plan.shapes)
        return Plan(watch, held, kernels.hold_layers(held), shapes, plans[0].width)


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, OneToken) and "forward" not in layer.__dict__


def _is_plain(config: Any) -> bool:
    """Whether layers get no mask that hides something and nobody collects what is inside."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        config._attn_implementation == "sdpa"
        and not config.output_attentions
        and not getattr(config, "output_hidden_states", False)
        and getattr(config, "return_dict", True) is not False
        and getattr(config, "sliding_window", None) is None
        and all(kind == "full_attention" for kind in kinds)
        and getattr(config, "is_causal", True) is not False
    )


def _is_one(tensor: Tensor | None) -> bool:
    return tensor is not None and ops.runs_directly(tensor) and tensor.shape == (1, 1)


def _hides_nothing(mask: Any, length: int) -> bool:
    """Whether transformers would give the layers no mask."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


def _changes_nothing(options: dict[str, Any]) -> bool:
    """Whether the result is what it is without them."""
    return not options or (
        options.keys() <= _OPTIONS
        and options.get("return_dict") is not False
        and not options.get("output_hidden_states")
        and not options.get("output_attentions")
    )
