"""The network: Qwen2.5 in Flax NNX, and the description of its parameters as data."""

from qwen_jax.model.abstract import ParamSpec, abstract, build, build_layer, empty, init, params_of
from qwen_jax.model.qwen2 import Qwen2

__all__ = ["ParamSpec", "Qwen2", "abstract", "build", "build_layer", "empty", "init", "params_of"]
