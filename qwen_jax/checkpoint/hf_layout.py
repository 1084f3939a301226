"""The table that maps our model's parameter paths to Hugging Face's tensor names, and back.

Every matrix keeps the contracted axis last, as Hugging Face stores it, so each of its tensors is a reshaped slice of
one of our parameters: ``parameter[index]`` and the tensor hold the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SHOWN = 8  # names listed per kind of error


class HFTensor(NamedTuple):
    """A Hugging Face tensor, and its place in one of our parameters.

    Attributes:
      name, shape: its name and shape in Hugging Face's model.
      index: where it lies in our parameter: ``parameter[index]``.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[Any, ...]


class Entry(NamedTuple):
    """A parameter of our model: its shape, and the Hugging Face tensors that it consists of."""

    shape: tuple[int, ...]
    tensors: tuple[HFTensor, ...]

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return prod(self.shape)


def layout(config: ModelConfig) -> dict[str, Entry]:
    """Return the shape and Hugging Face tensors of each of our parameters, by its path: ``layers.0.attention.wqkv``.

    The order is Hugging Face's usual one.
    """
    k, g, h = config.num_kv_heads, config.group_size, config.head_dim
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n = k * g
    every = slice(None)

    def whole(name: str, *shape: int, as_shape: tuple[int, ...] | None = None) -> Entry:
        return Entry(as_shape or shape, (HFTensor(name, shape, ()),))

    table = {"embed.weight": whole(EMBEDDING, v, d)}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        table |= {
            ours + "attention_norm.scale": whole(theirs + "input_layernorm.weight", d),
            ours + "attention.wqkv": Entry((k, g + 2, h, d), (
                HFTensor(attention + "q_proj.weight", (n * h, d), (every, slice(0, g))),
                HFTensor(attention + "k_proj.weight", (k * h, d), (every, g)),
                HFTensor(attention + "v_proj.weight", (k * h, d), (every, g + 1)),
            )),
            ours + "attention.bqkv": Entry((k, g + 2, h), (
                HFTensor(attention + "q_proj.bias", (n * h,), (every, slice(0, g))),
                HFTensor(attention + "k_proj.bias", (k * h,), (every, g)),
                HFTensor(attention + "v_proj.bias", (k * h,), (every, g + 1)),
            )),
            ours + "attention.wo": whole(attention + "o_proj.weight", d, n * h, as_shape=(d, k, g, h)),
            ours + "mlp_norm.scale": whole(theirs + "post_attention_layernorm.weight", d),
            ours + "mlp.gate_up": Entry((2, f, d), (
                HFTensor(mlp + "gate_proj.weight", (f, d), (0,)),
                HFTensor(mlp + "up_proj.weight", (f, d), (1,)),
            )),
            ours + "mlp.down": whole(mlp + "down_proj.weight", d, f),
        }
    table["norm.scale"] = whole("model.norm.weight", d)
    if not config.tie_word_embeddings:
        table["head.weight"] = whole(HEAD, v, d)
    return table


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face model by its name there, in order."""
    return {tensor.name: tensor.shape for entry in layout(config).values() for tensor in entry.tensors}


def assemble(entry: Entry, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return one of our parameters, put together from its Hugging Face tensors.

    Each ``read(name)`` result is dropped before the next call. Raises UserError when tensors that share a parameter
    differ in element type.
    """
    if len(entry.tensors) == 1:
        return read(entry.tensors[0].name).reshape(entry.shape)
    out = None
    for tensor in entry.tensors:
        value = read(tensor.name)
        if out is None:
            out = np.empty(entry.shape, value.dtype)
        elif value.dtype != out.dtype:
            raise UserError(f"{tensor.name} is {value.dtype}, but {entry.tensors[0].name}, stored together with it, is "
                            f"{out.dtype}: name one element type for all (--dtype)")
        out[tensor.index] = value.reshape(out[tensor.index].shape)
    return out


def split(entry: Entry, parameter: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """Split one of our parameters into its Hugging Face tensors: yield the name and C-contiguous value of each.

    The inverse of `assemble`.
    """
    for tensor in entry.tensors:
        yield tensor.name, np.ascontiguousarray(parameter[tensor.index]).reshape(tensor.shape)


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError, with a list of the differences, when the names and shapes ``found`` are not the model's.

    The message says ``where`` the tensors are. Rotary ``inv_freq`` buffers, which old exports carry, and a stored copy
    of a tied head are passed over. That the copy equals the embedding is checked where values are read.
    """
    expected = hf_shapes(config)
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and found.get(HEAD) == expected[EMBEDDING]:
        ignored.add(HEAD)
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected and name not in ignored],
        "misshapen": [f"{name} is {list(found[name])}, should be {list(shape)}" for name, shape in expected.items()
                      if name in found and tuple(found[name]) != shape],
    }
    if any(problems.values()):
        report = "; ".join(f"{len(items)} {kind}: {_listed(items)}" for kind, items in problems.items() if items)
        raise UserError(f"tensors in {where} do not match its config.json: {report}")


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
