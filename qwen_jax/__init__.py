"""Qwen2.5 in JAX/Flax with a DeepSeek-style inference engine."""

from importlib import import_module
from typing import TYPE_CHECKING

from qwen_jax.xla_flags import set_safe_flags

if TYPE_CHECKING:
    from qwen_jax.checkpoint import convert, export, load_model
    from qwen_jax.cluster.routing.rebalance import rebalance_load
    from qwen_jax.config import ModelConfig
    from qwen_jax.engine.api.sampling_params import SamplingParams
    from qwen_jax.engine.async_engine import AsyncEngine
    from qwen_jax.engine.config.engine_config import EngineConfig
    from qwen_jax.engine.engine import DeepSeekEngine, Engine
    from qwen_jax.engine.multihost.rendezvous import join
    from qwen_jax.engine.scheduling.schedule_policy import dynamic_schedule
    from qwen_jax.errors import UserError

set_safe_flags()

# Where each public name lives. Resolved on first use, so that `qwen-jax --help` does not import JAX.
_HOME = {
    "AsyncEngine": "qwen_jax.engine.async_engine",
    "DeepSeekEngine": "qwen_jax.engine.engine",
    "Engine": "qwen_jax.engine.engine",
    "EngineConfig": "qwen_jax.engine.config.engine_config",
    "ModelConfig": "qwen_jax.config",
    "SamplingParams": "qwen_jax.engine.api.sampling_params",
    "StructuredOutput": "qwen_jax.engine.api.structured_output",
    "UserError": "qwen_jax.errors",
    "convert": "qwen_jax.checkpoint",
    "dynamic_schedule": "qwen_jax.engine.scheduling.schedule_policy",
    "export": "qwen_jax.checkpoint",
    "join": "qwen_jax.engine.multihost.rendezvous",
    "load_model": "qwen_jax.checkpoint",
    "rebalance_load": "qwen_jax.cluster.routing.rebalance",
}
__all__ = ["AsyncEngine", "DeepSeekEngine", "Engine", "EngineConfig", "ModelConfig", "SamplingParams",
           "StructuredOutput", "UserError", "convert", "dynamic_schedule", "export", "join", "load_model",
           "rebalance_load"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
