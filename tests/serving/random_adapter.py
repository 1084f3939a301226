"""A LoRA adapter of the bundled model that changes its answers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qwen_jax.checkpoint import resolve
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.model.lora import LoraConfig, init_adapter


def save_random_adapter(folder: Path, seed: int = 0, scale: float = 0.3) -> None:
    """scale: 0 for one that changes nothing."""
    config, lora = resolve("bundled").config, LoraConfig(4, 8.0, ("q_proj", "down_proj"))
    rng = np.random.default_rng(seed)
    adapter = {key: jnp.asarray(scale * rng.normal(size=value.shape), jnp.float32)
               for key, value in init_adapter(config, lora).items()}
    save_adapter(adapter, config, lora, folder)
