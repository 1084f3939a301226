"""The device's side of an engine: weights, pages and programs, and what runs one program on them."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from qwen_kernels.sparse_attention import Sparsity
from tqdm import tqdm

from qwen_jax.engine.adapters import AdapterTable
from qwen_jax.engine.batch import dry_run_batch
from qwen_jax.engine.executables import Executables, planned, unplanned_compiles
from qwen_jax.engine.schedule import SPARSE, Bucket
from qwen_jax.engine.steps import Models, StepBatch, StepOutput, new_state, run_bucket
from qwen_jax.engine.weights import Weights
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2
from qwen_jax.quantization import Precision, Ranges, forms


class Runner:
    """Programs for every bucket of a table.

    Args:
      model: whose weights are version 0.
      num_pages, slots: sizes of the state on the device.
      vocab_limit: number of token ids that exist.
      draft: the model that guesses tokens, if there is one.
      sparsity: of each layer in the sparse schedule's buckets; None for a layer that attends to everything.
      precision: which parts are 8-bit; ranges: that were measured of each layer's keys and values; wide_pages: size
        of the pool of pages for what 8 bits cannot compute.
      cache_dir: where programs are kept; None keeps none.
      strict: refuse to go on after a compilation that was not part of a warm-up.
    """

    def __init__(self, model: Qwen2, table: tuple[Bucket, ...], num_pages: int, slots: int, vocab_limit: int,
                 adapters: AdapterTable, draft: Qwen2 | None, sparsity: tuple[Sparsity | None, ...],
                 precision: Precision, ranges: tuple[Ranges, ...] | None, wide_pages: int, cache_dir: Path | None,
                 strict: bool = False) -> None:
        self.table, self.adapters, self.weights = table, adapters, Weights(model, precision, ranges)
        self._slots, self._vocab_limit, self._strict = slots, np.int32(vocab_limit), strict
        self._vocab_size = model.config.vocab_size
        dtype = model.dtype
        self._draft_graph, self._draft = nnx.split(draft) if draft else (None, None)
        sparse = any(bucket.schedule == SPARSE for bucket in table)
        self._sparsity = sparsity
        self._new_state = partial(new_state, model.config, num_pages, slots, dtype, draft and draft.config,
                                  table[0].pages if sparse else 0, precision.kv_cache, wide_pages)
        self._state = None
        identity = [repr(model.config), str(dtype), num_pages, slots, adapters.identity_of_shapes,
                    draft and repr(draft.config), repr(sparsity) if sparse else None, repr(precision), wide_pages]
        self.executables = Executables(self._lower, identity, cache_dir)
        self.prepare_seconds: dict[Bucket, float] = {}
        self.warmup_seconds = 0.0
        self._compiles_at_warmup: int | None = None

    @property
    def ready(self) -> bool:
        return self._compiles_at_warmup is not None

    @property
    def compiles_after_warmup(self) -> int:
        """XLA compilations in this process since the warm-up that no engine planned."""
        return unplanned_compiles() - self._compiles_at_warmup if self.ready else 0

    def warmup(self, progress: bool) -> None:
        """Compile (or load from disk) and run every program once; nothing compiles afterwards.

        A new program runs on a full row. One from disk has done so before: it runs on none, which a prefill skips.
        """
        began = time.perf_counter()
        with planned(), self._bar(progress, "warm-up") as bar:
            if self._state is None:
                self._state = jax.jit(self._new_state)()
            for bucket, program in self.executables.prepare(self.table):
                self.prepare_seconds[bucket] = program.seconds
                dry = dry_run_batch(bucket, self._slots, self._vocab_size, rows=0 if program.from_disk else 1)
                jax.device_get(self.start(bucket, dry, self.weights.current))
                how = "loaded" if program.from_disk else "compiled"
                bar.set_postfix_str(f"{bucket} {how} in {program.seconds:.1f} s")
                bar.update()
        self.warmup_seconds = time.perf_counter() - began
        self._compiles_at_warmup = unplanned_compiles()

    def compile(self, progress: bool) -> None:
        """Compile (or load from disk) every program and run none: for this, weights may be shapes without values."""
        self._state = jax.eval_shape(self._new_state)
        with planned(), self._bar(progress, "compiling") as bar:
            for bucket, program in self.executables.prepare(self.table):
                self.prepare_seconds[bucket] = program.seconds
                bar.update()

    def _bar(self, progress: bool, what: str) -> tqdm:
        return tqdm(total=len(self.table), desc=what, unit="executable", file=sys.stderr, disable=not progress)

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> StepOutput:
        """Runs a step; its output may still be under way when this returns.

        When it or the output fails, the state is lost, and with it the runner.
        """
        if self._strict and self.compiles_after_warmup:
            raise UserError(f"{self.compiles_after_warmup} compilations since the warm-up, and strict_compiles is on: "
                            "something in this process compiles while requests wait")
        self._state, output = self.executables[bucket].run(*self._arguments(batch, version))
        return output

    def _arguments(self, batch: StepBatch, version: int) -> tuple:
        return (self.weights[version], self._draft, self._state, batch, self._vocab_limit, self.adapters.values)

    def _lower(self, bucket: Bucket) -> jax.stages.Lowered:
        def step(leaves, draft, state, batch, vocab_limit, adapters):
            params, scales = jax.tree.unflatten(self.weights.treedef, leaves)
            model = nnx.merge(self.weights.graph, params)
            rotation = model.config.rope.frequencies(model.config.head_dim)
            pages = tuple(one and forms(layer.attention.bqkv[...], one, *rotation)
                          for layer, one in zip(model.layers, scales, strict=True))
            models = Models(model, draft and nnx.merge(self._draft_graph, draft), self._sparsity,
                            pages if any(pages) else ())
            return run_bucket(models, bucket, state, batch, vocab_limit, adapters)

        batch = dry_run_batch(bucket, self._slots, self._vocab_size)
        return jax.jit(step, donate_argnums=2).lower(*self._arguments(batch, self.weights.current))

