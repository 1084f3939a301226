"""A stage: consecutive layers of a model on their devices, with the state of these, for which programs are lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from qwen_kernels.attention import PageFormat
from qwen_kernels.cpu import product_targets
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import UNTRACED
from qwen_jax.engine.compiled.lora_rows import Adapters
from qwen_jax.engine.compiled.state import EngineState, Models, new_state
from qwen_jax.engine.runner.padded_batch import allow_all_mask
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.model_shard import ModelShard
from qwen_jax.engine.weights.network_part import NetworkPart
from qwen_jax.engine.weights.weight_sharding import WeightSharding
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.model import Qwen2
from qwen_jax.model.partition import WHOLE
from qwen_jax.parallel.placement import put
from qwen_jax.quantization import page_formats


class ShardedWeights(NamedTuple):
    """Weights, and the division over devices (sharding) for which programs are compiled.

    When a program runs, the sharding is the weights' own; while programs are prepared, the weights may still be on
    other devices.
    """

    weights: VersionedWeights
    sharding: WeightSharding


class Sizes(NamedTuple):
    """Sizes of an engine that its programs and its state are made for, beside those of the model."""

    num_pages: int  # pages of the state on the devices
    slots: int  # sequences that run at once
    sparsity: tuple[Sparsity | None, ...]  # of each layer in the sparse schedule; None for full attention
    wide_pages: int = 0  # pages of the 16-bit fallback of 8-bit steps
    layers_per_program: int | None = None  # most layers that one program runs; None for a suitable number


class Stage:
    """A shard of the model on its devices: lowers programs for them, and holds the arguments that these run with.

    Args:
      table: every bucket that a step may have.
      index: number of the shard in the weights, the draft's weights and the adapters.
      draft: weights of the draft model, if there is one.

    Attributes:
      shard: layers and devices of the stage.
      draft_layout: layout of the draft model's parameters, if there is one.
      vocab_size: number of token ids that the model has logits for. vocab_limit: number of those that exist, which
        programs take as an argument.
      state: arrays (pages, token counts) that are donated to every step; None before `allocate`.
      identity: everything beside bucket and devices that the programs depend on.
    """

    def __init__(self, table: tuple[Bucket, ...], sizes: Sizes, index: int, *, weights: ShardedWeights,
                 adapters: AdapterTable, draft: ShardedWeights | None = None) -> None:
        sharding = weights.sharding
        self.shard: ModelShard = sharding.shards[index]
        draft_shard = draft and draft.sharding.shards[index]
        self.draft_layout = draft_shard and draft_shard.layout
        self._index, self._weights, self._adapters, self._draft = index, weights, adapters, draft
        self.dtype = sharding.dtype
        self._sparsity = sizes.sparsity[self.shard.start:self.shard.end]
        self.vocab_size = self.shard.layout.config.vocab_size
        self.vocab_limit = np.int32(self.vocab_size)
        self._sparse = any(bucket.schedule == SPARSE for bucket in table)
        precision = self.shard.precision(sharding.precision)
        self._new_state = partial(
            new_state, self.shard.padded_config, sizes.num_pages,
            slots=sizes.slots if self.shard.last else 0,  # tokens are counted where they are sampled
            dtype=sharding.dtype, draft=draft_shard and draft_shard.padded_config,
            sparse_width=table[0].pages if self._sparse else 0, kv_cache=precision.kv_cache,
            wide_pages=sizes.wide_pages)
        self.state: EngineState | None = None
        self._allocate: Callable[[], EngineState] | None = None
        self._masks: dict[int, jax.Array] = {}  # `allow_all_mask` on the devices, by rows
        self.identity = [_traced(self.shard), str(sharding.dtype), sizes.num_pages, sizes.slots,
                         adapters.identity_of_shapes, draft and _traced(draft_shard),
                         repr(self._sparsity) if self._sparse else None, repr(precision), sizes.wide_pages]
        if precision.format in ("int8", "int4") and jax.default_backend() == "cpu":
            self.identity.append(product_targets())  # which also registers it, before a program on disk asks for it

    def prepare(self) -> None:
        """Compile the program that allocates an empty state (pages, token counts) on the devices."""
        if self._allocate is None:
            shardings = jax.tree.map(lambda x: x.sharding, self.shapes)
            self._allocate = jax.jit(self._new_state, out_shardings=shardings).lower().compile()

    def allocate(self) -> None:
        """Allocate an empty state (pages, token counts) on the devices, if there is none."""
        self.prepare()
        if self.state is None:
            self.state = self._allocate()

    @cached_property
    def shapes(self) -> EngineState:
        """Shapes and shardings of the state. Pages and their summaries are divided as KV heads are."""
        def shapes_of(field: str, shapes: Any) -> Any:
            axes = () if field == "token_counts" else ("page", "kv_heads")
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.shard.sharding(
                (*axes, *"?" * (x.ndim - len(axes))), x.shape)), shapes)

        shapes = jax.eval_shape(self._new_state)
        return EngineState(*(shapes_of(field, getattr(shapes, field)) for field in shapes._fields))

    def lower(self, function: Callable, updated: Any, *arguments: Any) -> jax.stages.Lowered:
        """Lower ``function(updated, *arguments)`` for the stage's devices; the arguments may be shapes.

        Each device runs it on its own shards of the arguments. The function returns the new value of ``updated``, whose
        arrays are donated, and an output that is the same on every device.
        """
        arguments = (updated, *arguments)
        if self.shard.partition is WHOLE:
            return jax.jit(function, donate_argnums=0).lower(*arguments)
        specs = jax.tree.map(lambda x: x.sharding.spec if isinstance(getattr(x, "sharding", None), NamedSharding) else
                             PartitionSpec(), arguments)
        sharded = jax.shard_map(function, mesh=self.shard.mesh, in_specs=specs, out_specs=(specs[0], PartitionSpec()),
                                check_vma=False)
        return jax.jit(sharded, donate_argnums=0).lower(*arguments)

    # --- weights and adapters, for each of which there is the shape, with which programs are lowered, and the value

    @cached_property
    def whole(self) -> NetworkPart:
        """The network of all layers of the stage, with what is before and after them."""
        return self._weights.sharding.whole(self._index)

    @cached_property
    def ends(self) -> NetworkPart:
        """The embedding, the norm and the head, of which a stage in the middle has none."""
        return self._weights.sharding.ends(self._index)

    def block(self, start: int, end: int) -> NetworkPart:
        """Return the network of the stage's layers ``[start:end]``."""
        return self._weights.sharding.block(self._index, start, end)

    def layer_kinds(self, attention: str) -> list[tuple]:
        """Return for each layer of the stage what its programs depend on beside the shapes of a step."""
        kinds = self._weights.sharding.layer_kinds(self._index)
        sparsity = self._sparsity if attention == SPARSE else (None,) * len(kinds)
        return list(zip(kinds, sparsity, strict=True))

    @property
    def shapes_of_weights(self) -> tuple:
        return self._weights.sharding.shapes[self._index]

    def weights(self, version: int) -> tuple:
        """Return the arrays of a version of the weights."""
        return self._weights.weights.leaves_of[version][self._index]

    @property
    def shapes_of_draft(self) -> tuple | None:
        return self._draft and self._draft.sharding.shapes[self._index]

    @property
    def draft(self) -> tuple | None:
        """Arrays of the draft model's weights, if there is one."""
        return self._draft and self._draft.weights.leaves_of[0][self._index]

    @property
    def shapes_of_adapters(self) -> Adapters | None:
        return self._adapters.shapes(self.shard)

    @property
    def adapters(self) -> Adapters | None:
        """Arrays of the loaded LoRA adapters, in an engine that takes some."""
        return self._adapters.values[self._index]

    def models(self, part: NetworkPart, leaves: tuple, layers: slice = slice(None), *, draft: tuple | None = None,
               adapters: Adapters | None = None, vocab_limit: Any = None) -> Models:
        """Return the networks of a program around its traced arguments.

        layers: those of the part. draft: arrays of the draft model's weights. adapters: those of the part's layers.
        """
        target, scales = part.network(leaves)
        draft = None if draft is None else self.draft_network(draft)
        return Models(target, vocab_limit, draft=draft,
                      sparsity=self._sparsity[layers], page_formats=_page_formats(target, scales), adapters=adapters)

    def draft_network(self, leaves: tuple) -> Qwen2:
        """Return the draft model around the traced arrays of its weights."""
        return self._draft.sharding.whole(self._index).network(leaves)[0]

    def allow_all(self, rows: int) -> jax.Array:
        """Return masks on the devices that allow every token to be sampled."""
        if rows not in self._masks:
            self._masks[rows] = put(allow_all_mask(rows, self.vocab_size), self.shard.replicated)
        return self._masks[rows]


def _page_formats(model: Qwen2, scales) -> tuple[tuple[PageFormat, PageFormat] | None, ...]:
    """Return the 8-bit formats of each layer's pages of keys and values; empty where no pages are 8-bit."""
    if not scales:
        return ()
    rotation = model.config.rope.frequencies(model.config.head_dim)
    formats = tuple(scale and page_formats(layer.attention.bqkv[...], scale, *rotation)
                    for layer, scale in zip(model.layers, scales, strict=True))
    return formats if any(formats) else ()


def _traced(shard: ModelShard) -> str:
    """Return all of a shard that its programs depend on: not the model's control tokens, nor its type in files."""
    layout = replace(shard.layout, config=replace(shard.layout.config, **UNTRACED))
    return repr(replace(shard, layout=layout))
