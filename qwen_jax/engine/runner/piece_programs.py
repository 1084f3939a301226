"""Programs of the pieces of a step: which ones a bucket needs, how they are lowered, and what they run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.compiled import pieces
from qwen_jax.engine.compiled.pieces import BlockState, Piece
from qwen_jax.engine.compiled.state import EngineState, LayerOutput, Models, StepBatch
from qwen_jax.engine.runner.executable_cache import Key, Program, attention_tiles
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.runner.stage import Stage
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, Bucket
from qwen_jax.engine.scheduling.schedule_policy import FULL, attention_of
from qwen_jax.engine.weights.network_part import LAYERS, SPARSE_LAYERS, NetworkPart, divide

Block = tuple[int, int]  # layers [start, end) of a stage
FIRST_TOKEN = np.int32(0)


class StageBlocks:
    """The blocks that a stage's layers are divided into for a kind of attention, and which of them share programs."""

    def __init__(self, stage: Stage, attention: str, layers: int | None) -> None:
        kinds, usual = stage.layer_kinds(attention), LAYERS if attention == FULL else SPARSE_LAYERS
        self.blocks: list[Block] = divide(kinds, layers or usual, exact=layers is not None)
        self.parts = {block: stage.block(*block) for block in self.blocks}
        self.first_layer = {block: np.int32(stage.shard.start + block[0]) for block in self.blocks}
        by_kind: dict[Any, Block] = {}
        self.like = {(start, end): by_kind.setdefault((kinds[start], end - start), (start, end))
                     for start, end in self.blocks}  # the first block that has the same programs


class PiecePrograms:
    """Programs of the pieces that the steps of a replica are composed of.

    Args:
      slots: sequences that run at once.
      table: every bucket that a step may have.
      layers: most layers of a block; None for a number that suits the model.
    """

    def __init__(self, stages: Sequence[Stage], slots: int, table: Sequence[Bucket], layers: int | None) -> None:
        self.stages, self._slots, self._layers = stages, slots, layers
        self._blocks: dict[str, list[StageBlocks]] = {}
        self._sample_rows = sorted({self.rows(bucket) for bucket in table
                                    if bucket.phase == "decode" and bucket.tokens == 1})

    def blocks(self, attention: str) -> list[StageBlocks]:
        """Return how the layers of each stage are divided into blocks for a kind of attention."""
        if attention not in self._blocks:
            self._blocks[attention] = [StageBlocks(stage, attention, self._layers) for stage in self.stages]
        return self._blocks[attention]

    def rows(self, bucket: Bucket) -> int:
        """Return the rows of a micro-batch: there are as many as stages, or more where the bucket asks for it."""
        for count in range(min(len(self.stages), bucket.micro_rows), 0, -1):
            if bucket.micro_rows % count == 0:
                return bucket.micro_rows // count
        raise AssertionError("one micro-batch always divides")

    def wide(self, bucket: Bucket) -> bool:
        """Return whether a bucket is the 16-bit fallback of an 8-bit engine."""
        return bucket.precision != EIGHT_BIT and bool(self.stages[0].shapes.wide_k_pages)

    # --- the pieces of a bucket

    def keys(self, bucket: Bucket) -> list[Key]:
        """Return the keys of the programs that a bucket's steps run."""
        scores = [(self.scores(bucket), len(self.stages) - 1)] if bucket.phase == "prefill" else []
        return list(dict.fromkeys([*self.runs(bucket), *scores]))

    def runs(self, bucket: Bucket) -> list[Key]:
        """Return the keys of the programs that run one after another for a micro-batch and a token of each row.

        A prefill runs "scores" besides, once for every `SCORED` tokens whose log-probabilities are wanted.
        """
        last = len(self.stages) - 1
        keys: list[Key] = [(self.draft(bucket), 0)] if self.has_draft(bucket) else []
        keys.append((self.look_up(bucket), 0))
        keys += [(self.block(bucket, index, block), index)
                 for index, stage in enumerate(self.blocks(attention_of(bucket.schedule))) for block in stage.blocks]
        if bucket.phase == "prefill":
            keys.append((self.prefilled(bucket), last))
        return [*keys, (self.sample(bucket), last)]

    def has_draft(self, bucket: Bucket) -> bool:
        """Return whether a step of a bucket runs the draft model."""
        runs = bucket.phase == "prefill" or bucket.tokens > 1
        return runs and self.stages[0].shapes_of_draft is not None and not self.wide(bucket)

    def draft(self, bucket: Bucket) -> Piece:
        kind = "draft prefill" if bucket.phase == "prefill" else "guesses"
        return Piece(kind, self.rows(bucket), bucket.tokens, bucket.pages)

    def look_up(self, bucket: Bucket) -> Piece:
        return Piece("look-up", self.rows(bucket), bucket.tokens)

    def block(self, bucket: Bucket, stage: int, block: Block) -> Piece:
        attention = attention_of(bucket.schedule)
        return Piece("block", self.rows(bucket), bucket.tokens, bucket.pages, attention=attention,
                     wide=self.wide(bucket), chunk_pages=bucket.chunk_pages,
                     block=self.blocks(attention)[stage].like[block])

    def prefilled(self, bucket: Bucket) -> Piece:
        return Piece("prefilled", self.rows(bucket), bucket.tokens, bucket.pages, samples=self.sample(bucket).rows)

    def scores(self, bucket: Bucket) -> Piece:
        return Piece("scores", self.rows(bucket) * bucket.tokens)

    def sample(self, bucket: Bucket) -> Piece:
        """Return the piece that samples the tokens of a step; that of a prefill is one that decode steps have too."""
        rows = self.rows(bucket)
        if bucket.phase == "decode":
            return Piece("check" if bucket.tokens > 1 else "sample", rows, bucket.tokens, wide=self.wide(bucket))
        rows = next((size for size in self._sample_rows if size >= rows), rows)
        return Piece("sample", rows, wide=self.wide(bucket))

    # --- programs

    def lower(self, key: Key) -> jax.stages.Lowered:
        """Lower a program; arguments are shapes."""
        piece, index = key
        stage = self.stages[index]
        run = partial(self._run_piece, piece, index)
        with attention_tiles(piece.chunk_pages):
            return stage.lower(run, self._updated(stage.shapes, piece, piece.block),
                               self._constants(piece, index, piece.block, version=None), *self._inputs(piece, stage))

    def run(self, programs: Mapping[Key, Program], key: Key, inputs: tuple, version: int, *, block: Block = (0, 0)
            ) -> Any:
        """Run a piece's program with a version of the weights and the stage's state, which it replaces in part.

        block: layers to run, of a "block". Returns the program's output, which the devices may still be computing.
        """
        piece, stage = key
        on = self.stages[stage]
        updated, output = programs[key].run(self._updated(on.state, piece, block),
                                            self._constants(piece, stage, block, version), *inputs)
        on.state = _stored(on.state, piece, block, updated)
        return output

    def _run_piece(self, piece: Piece, index: int, updated: Any, constants: tuple, *inputs: Any) -> tuple[Any, Any]:
        """Compute a piece; this is what is traced. Arguments: what it updates, weights and the like, and its inputs."""
        leaves, draft, adapters, vocab_limit = constants
        stage = self.stages[index]
        if piece.kind in ("draft prefill", "guesses"):
            models = Models(None, vocab_limit, draft=stage.draft_network(draft))
            if piece.kind == "draft prefill":
                return pieces.draft_prefill(models, updated, *inputs), ()
            return pieces.guess_tokens(models, updated, *inputs)
        models = stage.models(self._part(piece, index, piece.block), leaves, slice(*piece.block), adapters=adapters,
                              vocab_limit=vocab_limit)
        match piece.kind:
            case "look-up":
                return (), pieces.look_up(models, *inputs, stage.dtype)
            case "block":
                batch, entering, token_index, first_layer = inputs
                return pieces.run_block(models, piece, updated, batch, entering, token_index=token_index,
                                        first_layer=first_layer)
            case "prefilled":
                return pieces.finish_prefill(models, piece, updated, *inputs)
            case "scores":
                return (), pieces.score_positions(models, *inputs)
            case "sample":
                batch, hidden, trips, token_index = inputs
                return pieces.sample_last(models, piece, updated, batch, hidden, trips=trips, token_index=token_index)
            case "check":
                return pieces.check_guesses(models, piece, updated, *inputs)
        raise AssertionError(piece)

    def _part(self, piece: Piece, stage: int, block: Block) -> NetworkPart:
        if piece.kind != "block":
            return self.stages[stage].ends
        return self.blocks(piece.attention)[stage].parts[block]

    def _constants(self, piece: Piece, index: int, block: Block, version: int | None) -> tuple:
        """Return what a piece reads beside its inputs: arrays of a version of the weights, or shapes for None."""
        stage, shapes = self.stages[index], version is None
        if piece.kind in ("draft prefill", "guesses"):
            return None, stage.shapes_of_draft if shapes else stage.draft, None, stage.vocab_limit
        leaves = self._part(piece, index, block).leaves(stage.shapes_of_weights if shapes else stage.weights(version))
        adapters = (stage.shapes_of_adapters if shapes else stage.adapters) if piece.kind == "block" else None
        if adapters is not None:
            adapters = adapters._replace(layers=adapters.layers[slice(*block)])
        samples = piece.kind in ("scores", "sample", "check")
        return leaves, None, adapters, stage.vocab_limit if samples else None

    def _updated(self, state: EngineState, piece: Piece, block: Block) -> Any:
        """Return the arrays of the state, or their shapes, that a piece updates."""
        match piece.kind:
            case "block":
                layers = slice(*block)
                k_pages, v_pages = (state.wide_k_pages, state.wide_v_pages) if piece.wide else (state.k_pages,
                                                                                              state.v_pages)
                return BlockState(k_pages[layers], v_pages[layers],
                                  () if piece.attention == FULL else state.summaries[layers])
            case "prefilled" | "sample" | "check":
                return state.token_counts
            case "draft prefill" | "guesses":
                return BlockState(state.draft_k_pages, state.draft_v_pages, ())
        return ()

    def _inputs(self, piece: Piece, stage: Stage) -> tuple:
        """Return the shapes of a piece's inputs."""
        rows, tokens = piece.rows, piece.tokens

        def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=stage.shard.replicated)

        def hidden(*sizes: int) -> jax.ShapeDtypeStruct:
            return shape(*sizes, stage.shard.layout.config.hidden_size, dtype=stage.dtype)

        def batch(fields: Sequence[str]) -> StepBatch:
            phase = "prefill" if piece.kind in ("prefilled", "draft prefill") else "decode"
            bucket = Bucket(phase, FULL, rows, tokens, piece.pages)
            return jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype),
                                select(dry_run_batch(bucket, self._slots, stage.vocab_size), fields))

        layers = LayerOutput(hidden(rows, tokens), shape(rows, 2), shape(rows))
        match piece.kind:
            case "look-up":
                return shape(rows, tokens),
            case "block":
                return batch(pieces.LAYER_FIELDS), layers, FIRST_TOKEN, FIRST_TOKEN
            case "prefilled":
                return batch(pieces.PREFILL_FIELDS), layers
            case "scores":
                size = min(pieces.SCORED, rows)
                return hidden(rows), shape(size), shape(size)
            case "sample":
                return batch(pieces.SAMPLE_FIELDS), hidden(rows, 1), shape(rows), FIRST_TOKEN
            case "check":
                return batch(pieces.SAMPLE_FIELDS), layers
            case "draft prefill":
                return batch(pieces.DRAFT_FIELDS),
            case "guesses":
                return batch(pieces.DRAFT_FIELDS), stage.shapes.token_counts
        raise AssertionError(piece)


def select(batch: StepBatch, fields: Sequence[str]) -> StepBatch:
    """Return a batch that has these fields alone; the others are None."""
    return StepBatch(**{name: getattr(batch, name) if name in fields else None for name in StepBatch._fields})


def _stored(state: EngineState, piece: Piece, block: Block, updated: Any) -> EngineState:
    """Return the state with the arrays that a piece has updated."""
    match piece.kind:
        case "block":
            start, end = block

            def spliced(layers: tuple, new: tuple) -> tuple:
                return (*layers[:start], *new, *layers[end:])

            names = ("wide_k_pages", "wide_v_pages") if piece.wide else ("k_pages", "v_pages")
            changed = {name: spliced(getattr(state, name), new) for name, new in zip(names, updated[:2], strict=True)}
            if updated.summaries:
                changed["summaries"] = spliced(state.summaries, updated.summaries)
            return state._replace(**changed)
        case "prefilled" | "sample" | "check":
            return state._replace(token_counts=updated)
        case "draft prefill" | "guesses":
            return state._replace(draft_k_pages=updated.k_pages, draft_v_pages=updated.v_pages)
    return state
