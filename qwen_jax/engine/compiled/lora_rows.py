"""LoRA adapters inside a step: each row of a batch has its own."""

from __future__ import annotations

from typing import NamedTuple

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.model.lora import adapt_site

NO_ADAPTER = 0  # the slot whose values stay zero



class Adapters(NamedTuple):
    """What a step is given. Slot 0 is no adapter."""

    layers: tuple[dict[str, jax.Array], ...]  # per layer: {target}.a [S, r, I], {target}.b [S, O, r]
    scale: jax.Array  # f32[S]



def adapt_rows(config: ModelConfig, adapters: Adapters, slots: jax.Array):
    """``adapt`` for ``Qwen2.hidden``: row b with the adapter in slot ``slots[b]`` (i32[R])."""
    scale = adapters.scale[slots]
    rows = [{name: values[slots] for name, values in layer.items()} for layer in adapters.layers]

    def adapt(layer: int, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return adapt_site(config, rows[layer], scale, site, x, y)

    return adapt
