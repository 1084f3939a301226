"""Access to the arrays that a model computes on the way to its logits, without a change to the model.

    with capture(model, ["layers.0", "layers.1.attention.q", "layers.1.attention.k"]) as captured:
        logits = model(tokens)
    stream = captured["layers.0"]                                                                  # [B, T, D]
    mass = attention_mass(captured["layers.1.attention.q"], captured["layers.1.attention.k"])      # [B, N, T, S]

For a compiled function, write the block inside it and return ``captured`` with the rest: arrays that are not returned
are not computed. Outside of a block the model is unchanged.

Axes: B rows, T query tokens, S key tokens, D model, K KV heads, G query heads per KV head, N = K * G, H head dim.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import PAGE

from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2
from qwen_jax.model.partition import WHOLE

# Site within a layer -> module, its method that returns the array, index of the array in what the method returns.
_OF_LAYER: dict[str, tuple[str, str, int | None]] = {
    "": ("", "add_mlp", None),                           # residual stream after the layer [B, T, D]
    ".attention": ("attention", "output", None),         # output of attention [B, T, D]
    ".attention.q": ("attention", "project", 0),         # rotated queries [B, T, K, G, H]
    ".attention.k": ("attention", "project", 1),         # rotated keys [B, T, K, H]
    ".attention.v": ("attention", "project", 2),         # values [B, T, K, H]
    ".mlp": ("mlp", "__call__", None)}                   # output of the MLP [B, T, D]


class _Site(NamedTuple):
    """Place in a model where an array is computed: module, method, and index in what the method returns."""
    module: object
    method: str
    part: int | None


@contextmanager
def capture(model: Qwen2, sites: Iterable[str]) -> Iterator[dict[str, jax.Array]]:
    """Yield a mapping that holds the arrays of these sites after the model has run within the block.

    Sites, for a layer i counted from 0: ``layers.i``, ``layers.i.attention``, ``layers.i.attention.q``, ``.k``, ``.v``,
    ``layers.i.mlp`` (see `_OF_LAYER`), and ``norm``, the final normalised states ``[B, T, D]``. If the model runs
    several times, the arrays are those of the last run. Only this object is observed, not a copy (``nnx.merge``).

    Raises UserError for an unknown site, for one device's part of a model, and at the end of a block in which a site
    was not computed.
    """
    if model.partition is not WHOLE:
        raise UserError("capture needs the whole model, not one device's part of it: load it without tp_size")
    wanted = {name: _find(model, name) for name in sites}
    captured: dict[str, jax.Array] = {}
    with ExitStack() as stack:
        for kind, method in {(type(site.module), site.method) for site in wanted.values()}:
            sites = [(name, site) for name, site in wanted.items()
                     if (type(site.module), site.method) == (kind, method)]
            stack.enter_context(_watched(kind, method, functools.partial(_keep, captured, sites)))
        yield captured
    missing = sorted(wanted.keys() - captured.keys())
    if missing:
        raise UserError(f"{missing[0]} was not computed within the block: run this model there, and not in a function "
                        "that was compiled before (write the block inside of it)")


def _find(model: Qwen2, name: str) -> _Site:
    """Return the place in the model where the array called ``name`` is computed. UserError for an unknown name."""
    if name == "norm":
        return _Site(model.norm, "__call__", None)
    match = re.fullmatch(r"layers\.(\d+)(\..+)?", name)
    if not match or (match[2] or "") not in _OF_LAYER or int(match[1]) >= len(model.layers):
        raise UserError(f"unknown site {name!r}: use norm, or layers.i{', layers.i'.join(_OF_LAYER)} for i from 0 to "
                        f"{len(model.layers) - 1}")
    module, method, part = _OF_LAYER[match[2] or ""]
    layer = model.layers[int(match[1])]
    return _Site(getattr(layer, module) if module else layer, method, part)


def _keep(captured: dict[str, jax.Array], sites: list[tuple[str, _Site]], module: object, result) -> None:
    """Store in `captured` the arrays, taken from `result`, of those sites whose method was called on `module`."""
    for name, site in sites:
        if site.module is module:
            captured[name] = result if site.part is None else result[site.part]


@contextmanager
def _watched(kind: type, method: str, observe: Callable[[object, object], None]) -> Iterator[None]:
    """Call ``observe(object, result)`` after every call of a class's method within the block."""
    original = getattr(kind, method)

    @functools.wraps(original)
    def watched(self, *arguments, **options):
        result = original(self, *arguments, **options)
        observe(self, result)
        return result

    setattr(kind, method, watched)
    try:
        yield
    finally:
        setattr(kind, method, original)


def attention_mass(q: jax.Array, k: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Compute the share of its attention that every query gives to every key: float32 ``[B, N, T, S]``, rows sum to 1.

    q ``[B, T, K, G, H]`` and k ``[B, S, K, H]`` are captured arrays, T = S; the causal softmax is that of
    `qwen_kernels.attention.reference`. segment_ids ``[B, T]``: the segments given to the model, if any.
    """
    batch, tokens, kv_heads, group, dim = q.shape
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * dim ** -0.5
    visible = jnp.tril(jnp.ones((tokens, tokens), bool))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    mass = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return mass.reshape(batch, kv_heads * group, tokens, tokens)


def page_mass(mass: jax.Array) -> jax.Array:
    """Add up attention shares of keys, ``[B, N, T, S]``, over pages of `PAGE` keys: ``[B, N, T, pages]``."""
    pages = -(-mass.shape[-1] // PAGE)
    padded = jnp.pad(mass, ((0, 0),) * 3 + ((0, pages * PAGE - mass.shape[-1]),))
    return padded.reshape(*mass.shape[:-1], pages, PAGE).sum(-1)
