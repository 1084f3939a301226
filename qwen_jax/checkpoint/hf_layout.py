"""One table between our parameter paths and Hugging Face's tensor names, read in both directions.

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


class Part(NamedTuple):
    """One Hugging Face tensor: its name, its shape there, and where it lies in our parameter."""

    name: str
    shape: tuple[int, ...]
    index: tuple[Any, ...]


class Entry(NamedTuple):
    """One of our parameters: its shape and the Hugging Face tensors that make it up."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def layout(config: ModelConfig) -> dict[str, Entry]:
    """Canonical path -> Entry, in Hugging Face's usual order. Shapes are element counts."""
    k, g, h = config.num_kv_heads, config.group_size, config.head_dim
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n = k * g
    every = slice(None)

    def whole(name: str, *shape: int, as_shape: tuple[int, ...] | None = None) -> Entry:
        return Entry(as_shape or shape, (Part(name, shape, ()),))

    table = {"embed.weight": whole(EMBEDDING, v, d)}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        table |= {
            ours + "attention_norm.scale": whole(theirs + "input_layernorm.weight", d),
            ours + "attention.wqkv": Entry((k, g + 2, h, d), (
                Part(attention + "q_proj.weight", (n * h, d), (every, slice(0, g))),
                Part(attention + "k_proj.weight", (k * h, d), (every, g)),
                Part(attention + "v_proj.weight", (k * h, d), (every, g + 1)),
            )),
            ours + "attention.bqkv": Entry((k, g + 2, h), (
                Part(attention + "q_proj.bias", (n * h,), (every, slice(0, g))),
                Part(attention + "k_proj.bias", (k * h,), (every, g)),
                Part(attention + "v_proj.bias", (k * h,), (every, g + 1)),
            )),
            ours + "attention.wo": whole(attention + "o_proj.weight", d, n * h, as_shape=(d, k, g, h)),
            ours + "mlp_norm.scale": whole(theirs + "post_attention_layernorm.weight", d),
            ours + "mlp.gate_up": Entry((2, f, d), (
                Part(mlp + "gate_proj.weight", (f, d), (0,)),
                Part(mlp + "up_proj.weight", (f, d), (1,)),
            )),
            ours + "mlp.down": whole(mlp + "down_proj.weight", d, f),
        }
    table["norm.scale"] = whole("model.norm.weight", d)
    if not config.tie_word_embeddings:
        table["head.weight"] = whole(HEAD, v, d)
    return table


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of the model, in order."""
    return {part.name: part.shape for entry in layout(config).values() for part in entry.parts}


def assemble(entry: Entry, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our parameter from its tensors; ``read(name)`` is called once per tensor, which is dropped before the next.

    Raises UserError when tensors that share a parameter differ in element type.
    """
    if len(entry.parts) == 1:
        return read(entry.parts[0].name).reshape(entry.shape)
    out = None
    for part in entry.parts:
        tensor = read(part.name)
        if out is None:
            out = np.empty(entry.shape, tensor.dtype)
        elif tensor.dtype != out.dtype:
            raise UserError(f"{part.name} is {tensor.dtype}, but {entry.parts[0].name}, stored together with it, is "
                            f"{out.dtype}: name one element type for all (--dtype)")
        out[part.index] = tensor.reshape(out[part.index].shape)
    return out


def split(entry: Entry, parameter: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """The inverse of ``assemble``: each tensor's name and value, C-contiguous, in the order of the table."""
    for part in entry.parts:
        yield part.name, np.ascontiguousarray(parameter[part.index]).reshape(part.shape)


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors found with those the model needs; one UserError reports everything that differs.

    Rotary ``inv_freq`` buffers, which old exports carry, and a stored copy of a tied head are passed over (whether
    the copy equals the embedding is checked where values are read).
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
