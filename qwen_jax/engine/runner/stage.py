"""One part of a model on its devices: its state, and how a step is lowered for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from qwen_kernels.attention import EightBit
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.engine.compiled.state import EngineState, Models, StepBatch, new_state
from qwen_jax.engine.runner.padded_batch import everything
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.model_shard import ModelShard, put_global
from qwen_jax.engine.weights.weight_sharding import WeightSharding
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.model import Qwen2
from qwen_jax.model.partition import WHOLE
from qwen_jax.quantization import forms


class ShardedWeights(NamedTuple):
    """Weights, and how they are spread where this is for: `VersionedWeights.sharding` when it runs."""

    weights: VersionedWeights
    sharding: WeightSharding


class Sizes(NamedTuple):
    """What programs and their state are made for, beside the model.

    Attributes:
      num_pages, slots: of the state on the devices.
      vocab_limit: number of token ids that exist.
      sparsity: of each layer in the sparse schedule's buckets; None for a layer that attends to everything.
      wide_pages: of the pool for what 8 bits cannot compute.
    """

    num_pages: int
    slots: int
    vocab_limit: int
    sparsity: tuple[Sparsity | None, ...]
    wide_pages: int = 0


class Stage:
    """What runs on one part's devices.

    Args:
      held: the weights, of which it runs with part number ``part``; draft: those of the model that guesses tokens, if
        there is one. Programs are lowered from the shapes in the spreads, so the weights themselves may be elsewhere
        until the first step.

    Attributes:
      state: donated to every step; None before `allocate`.
      identity: what the programs depend on.
    """

    def __init__(self, table: tuple[Bucket, ...], sizes: Sizes, held: ShardedWeights, part: int, adapters: AdapterTable,
                 draft: ShardedWeights | None) -> None:
        sharding = held.sharding
        self.part: ModelShard = sharding.parts[part]
        self.draft_layout = draft and draft.sharding.parts[part].layout
        self._index, self._held, self._adapters, self._draft = part, held, adapters, draft
        layers = slice(self.part.start, self.part.end)
        self.dtype = sharding.dtype
        self._sparsity = sizes.sparsity[layers]
        self._vocab_limit, self._vocab_size = np.int32(sizes.vocab_limit), self.part.layout.config.vocab_size
        sparse = any(bucket.schedule == SPARSE for bucket in table)
        precision = self.part.precision(sharding.precision)
        slots = sizes.slots if self.part.last else 0  # tokens are counted where they are sampled
        self._new_state = partial(new_state, self.part.held, sizes.num_pages, slots, sharding.dtype,
                                  draft and draft.sharding.parts[part].held, table[0].pages if sparse else 0,
                                  precision.kv_cache, sizes.wide_pages)
        self.state: EngineState | None = None
        self._allocate: Callable[[], EngineState] | None = None
        self._masks: dict[int, jax.Array] = {}
        self.identity = [repr(self.part), str(sharding.dtype), sizes.num_pages, sizes.slots,
                         adapters.identity_of_shapes, draft and repr(draft.sharding.parts[part]),
                         repr(self._sparsity) if sparse else None, repr(precision), sizes.wide_pages]

    def prepare(self) -> None:
        """Compiles what `allocate` runs."""
        if self._allocate is None:
            shardings = jax.tree.map(lambda x: x.sharding, self.shapes)
            self._allocate = jax.jit(self._new_state, out_shardings=shardings).lower().compile()

    def allocate(self) -> None:
        """An empty state on the devices, if there is none."""
        self.prepare()
        if self.state is None:
            self.state = self._allocate()

    @cached_property
    def shapes(self) -> EngineState:
        """Of the state. Pages and what summarises them are divided as KV heads are."""
        def of_field(name: str, shapes: Any) -> Any:
            axes = () if name == "token_counts" else ("page", "kv_heads")
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.part.sharding(
                (*axes, *"?" * (x.ndim - len(axes))), x.shape)), shapes)

        shapes = jax.eval_shape(self._new_state)
        return EngineState(*(of_field(name, getattr(shapes, name)) for name in shapes._fields))

    def shapes_of_arguments(self, batch: StepBatch, *others: Any) -> tuple:
        """As `arguments`, to lower a step with."""
        return (self._held.sharding.shapes[self._index], self._draft and self._draft.sharding.shapes[self._index],
                self.shapes, batch, self._vocab_limit, self._adapters.shapes(self.part), *others)

    def arguments(self, batch: StepBatch, version: int, *others: Any) -> tuple:
        """Of a step; the state is number `STATE`."""
        rows = len(batch.tokens)
        if batch.allowed is everything(rows, self._vocab_size):  # most steps send nothing else: it stays there
            if rows not in self._masks:
                self._masks[rows] = put_global(batch.allowed, self.part.replicated)
            batch = batch._replace(allowed=self._masks[rows])
        draft = self._draft and self._draft.weights[0][self._index]
        return (self._held.weights[version][self._index], draft, self.state, batch, self._vocab_limit,
                self._adapters.values[self._index], *others)

    def models(self, leaves: tuple, draft: tuple | None) -> Models:
        """While a step is traced."""
        params, scales = jax.tree.unflatten(self._held.sharding.treedefs[self._index], leaves)
        model = nnx.merge(self._held.sharding.graphs[self._index], params)
        if draft is not None:
            params, _ = jax.tree.unflatten(self._draft.sharding.treedefs[self._index], draft)
            draft = nnx.merge(self._draft.sharding.graphs[self._index], params)
        return Models(model, draft, self._sparsity, _forms_of_pages(model, scales))

    def lower(self, step: Callable, arguments: tuple) -> jax.stages.Lowered:
        """``step`` for this part's devices, each of which runs it on its own shards of the arguments. It returns the
        state and something that is the same on every device."""
        if self.part.partition is WHOLE:
            return jax.jit(step, donate_argnums=STATE).lower(*arguments)
        specs = jax.tree.map(lambda x: x.sharding.spec if isinstance(getattr(x, "sharding", None), NamedSharding) else
                             PartitionSpec(), arguments)
        mapped = jax.shard_map(step, mesh=self.part.mesh, in_specs=specs, out_specs=(specs[STATE], PartitionSpec()),
                               check_vma=False)
        return jax.jit(mapped, donate_argnums=STATE).lower(*arguments)


STATE = 2  # its place among the arguments


def _forms_of_pages(model: Qwen2, scales) -> tuple[tuple[EightBit, EightBit] | None, ...]:
    """How 8-bit pages hold each layer's keys and values; empty where none are."""
    rotation = model.config.rope.frequencies(model.config.head_dim)
    pages = tuple(one and forms(layer.attention.bqkv[...], one, *rotation)
                  for layer, one in zip(model.layers, scales, strict=True))
    return pages if any(pages) else ()
