"""LoRA adapters inside a step: each row of a batch has its own."""

from __future__ import annotations

from typing import NamedTuple

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.model.lora import adapt_site

NO_ADAPTER = 0  # the adapter slot whose values stay zero


class Adapters(NamedTuple):
    """Weights of all loaded LoRA adapters, stacked along an axis of A slots. Slot 0 stands for no adapter."""

    layers: tuple[dict[str, jax.Array], ...]  # per layer: {target}.a [A, r, I], {target}.b [A, O, r]
    scale: jax.Array  # f32[A]


def adapt_rows(config: ModelConfig, adapters: Adapters, adapter_slots: jax.Array):
    """Return the function with which ``Qwen2.hidden`` applies to row b the adapter in slot ``adapter_slots[b]``."""
    scale = adapters.scale[adapter_slots]
    rows = [{name: values[adapter_slots] for name, values in layer.items()} for layer in adapters.layers]

    def adapt(layer: int, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return adapt_site(config, rows[layer], scale, site=site, x=x, y=y)

    return adapt
