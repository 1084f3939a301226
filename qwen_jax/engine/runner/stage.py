"""A stage: consecutive layers of a model on their devices, with the state of these, which lowers and runs programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from qwen_kernels.attention import PageFormat
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.engine.compiled.lora_rows import Adapters
from qwen_jax.engine.compiled.state import EngineState, Models, StepBatch, new_state
from qwen_jax.engine.runner.executable_cache import Program
from qwen_jax.engine.runner.padded_batch import allow_all_mask
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.model_shard import ModelShard
from qwen_jax.engine.weights.weight_sharding import WeightSharding
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.model import Qwen2
from qwen_jax.model.partition import WHOLE
from qwen_jax.parallel.placement import put
from qwen_jax.quantization import page_formats

_STATE = 2  # place of the state among the arguments of a program


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
    vocab_limit: int  # number of token ids that exist
    sparsity: tuple[Sparsity | None, ...]  # of each layer in the sparse schedule; None for full attention
    wide_pages: int = 0  # pages of the 16-bit fallback of 8-bit steps


class Stage:
    """A shard of the model on its devices: lowers and runs programs there, and holds the state that they update.

    Args:
      table: every bucket that a step may have.
      index: number of the shard in the weights, the draft's weights and the adapters.
      draft: weights of the draft model, if there is one.

    Attributes:
      shard: layers and devices of the stage.
      draft_layout: layout of the draft model's parameters, if there is one.
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
        self._vocab_limit, self._vocab_size = np.int32(sizes.vocab_limit), self.shard.layout.config.vocab_size
        sparse = any(bucket.schedule == SPARSE for bucket in table)
        precision = self.shard.precision(sharding.precision)
        self._new_state = partial(
            new_state, self.shard.padded_config, sizes.num_pages,
            slots=sizes.slots if self.shard.last else 0,  # tokens are counted where they are sampled
            dtype=sharding.dtype, draft=draft_shard and draft_shard.padded_config,
            sparse_width=table[0].pages if sparse else 0, kv_cache=precision.kv_cache, wide_pages=sizes.wide_pages)
        self.state: EngineState | None = None
        self._allocate: Callable[[], EngineState] | None = None
        self._masks: dict[int, jax.Array] = {}  # `allow_all_mask` on the devices, by rows
        self.identity = [repr(self.shard), str(sharding.dtype), sizes.num_pages, sizes.slots,
                         adapters.identity_of_shapes, draft and repr(draft_shard),
                         repr(self._sparsity) if sparse else None, repr(precision), sizes.wide_pages]

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

    def lower(self, run: Callable, batch: StepBatch, *more: Any) -> jax.stages.Lowered:
        """Lower ``run(models, state, batch, *more)`` for the stage's devices; ``batch`` and ``more`` may be shapes.

        Each device runs it on its own shards of the arguments. ``run`` returns the state and an output that is the same
        on every device.
        """
        draft_leaves = self._draft and self._draft.sharding.shapes[self._index]
        arguments = (self._weights.sharding.shapes[self._index], draft_leaves, self.shapes, batch, self._vocab_limit,
                     self._adapters.shapes(self.shard), *more)

        def step(leaves, draft_leaves, state, batch, vocab_limit, adapters, *more):
            return run(self._models(leaves, draft_leaves, vocab_limit, adapters), state, batch, *more)

        if self.shard.partition is WHOLE:
            return jax.jit(step, donate_argnums=_STATE).lower(*arguments)
        specs = jax.tree.map(lambda x: x.sharding.spec if isinstance(getattr(x, "sharding", None), NamedSharding) else
                             PartitionSpec(), arguments)
        sharded = jax.shard_map(step, mesh=self.shard.mesh, in_specs=specs, out_specs=(specs[_STATE], PartitionSpec()),
                                check_vma=False)
        return jax.jit(sharded, donate_argnums=_STATE).lower(*arguments)

    def run(self, program: Program, batch: StepBatch, version: int, *more: Any) -> Any:
        """Run a compiled program with a version of the weights and the state, which it replaces; return its output."""
        rows = len(batch.tokens)
        if batch.allowed is allow_all_mask(rows, self._vocab_size):
            if rows not in self._masks:
                self._masks[rows] = put(batch.allowed, self.shard.replicated)
            batch = batch._replace(allowed=self._masks[rows])
        draft_leaves = self._draft and self._draft.weights.leaves_of[0][self._index]
        leaves = self._weights.weights.leaves_of[version][self._index]
        arguments = (leaves, draft_leaves, self.state, batch, self._vocab_limit, self._adapters.values[self._index],
                     *more)
        self.state, output = program.run(*arguments)
        return output

    def _models(self, leaves: tuple, draft_leaves: tuple | None, vocab_limit: jax.Array, adapters: Adapters | None
                ) -> Models:
        """Return the network, and the draft model if there is one, around the traced arguments of a program."""
        target, scales = self._network(self._weights.sharding, leaves)
        draft = None if draft_leaves is None else self._network(self._draft.sharding, draft_leaves)[0]
        return Models(target, vocab_limit, draft=draft, sparsity=self._sparsity,
                      page_formats=_page_formats(target, scales), adapters=adapters)

    def _network(self, sharding: WeightSharding, leaves: tuple) -> tuple[Qwen2, Any]:
        """Return the shard's network around the arrays of its weights, and the scales of its 8-bit pages."""
        params, scales = jax.tree.unflatten(sharding.treedefs[self._index], leaves)
        return nnx.merge(sharding.graphs[self._index], params), scales


def _page_formats(model: Qwen2, scales) -> tuple[tuple[PageFormat, PageFormat] | None, ...]:
    """Return the 8-bit formats of each layer's pages of keys and values; empty where no pages are 8-bit."""
    rotation = model.config.rope.frequencies(model.config.head_dim)
    formats = tuple(scale and page_formats(layer.attention.bqkv[...], scale, *rotation)
                    for layer, scale in zip(model.layers, scales, strict=True))
    return formats if any(formats) else ()
