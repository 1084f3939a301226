"""Predicted cost of a plan's steps: operations, bytes and seconds on each device.

A roofline (Williams et al., 2009): a step takes as long as its operations at the device's peak or its bytes at the
memory's bandwidth, whichever is longer, and then its collectives. Where tokens go through the layers in two halves, a
half's collective takes only what is longer than the other half's computing beside it (see `model.partition`).
A ring moves ``2 (t - 1) / t`` of an all-reduce's bytes over each of t devices' links, half as much for an all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_kernels.page import PAGE

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.hardware import BANDWIDTH_SHARE, COMPUTE_SHARE, LINK_SHARE, Hardware
from qwen_jax.parallel.page_bytes import kv_page_bytes, summary_page_bytes
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision

ITEM = {"bfloat16": 2, "float32": 4}  # bytes
# Copies of the engine's numbers, which this package must not import: tokens of a sequence beyond which attention is
# sparse; tokens of a step from which they are divided over the devices between products, and from which they go in
# halves; rows that are sampled, and positions that are scored, at once.
SPARSE_ABOVE, SCATTER_FROM, OVERLAP_FROM, SAMPLED_ROWS, SCORED_TOKENS = 8192, 1024, 2048, 32, 64
HALF_MULTIPLE = 128  # copy of the model's: tokens that divide half a row


@dataclass(frozen=True)
class StepCost:
    """Predicted cost of one step of the engine on each device of a pipeline stage.

    Attributes:
      flops: floating-point operations.
      bytes: bytes read from memory.
      collective_bytes: bytes over each link.
      collectives: number of collectives.
      exchanging: seconds of collectives that no computation hides.
      seconds: time in all.
    """

    flops: float
    bytes: float
    collective_bytes: float
    collectives: int
    exchanging: float
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """Predictor of the memory and time of a model's steps on the devices of a plan.

    Attributes:
      config: the model.
      plan: division of the model over devices.
      hardware: the kind of device.
      precision: the model's 8-bit parts.
      dtype: "bfloat16" or "float32", of everything that is not 8-bit.
    """

    config: ModelConfig
    plan: ParallelPlan
    hardware: Hardware
    precision: Precision
    dtype: str = "bfloat16"

    def weight_bytes(self, stage: int) -> int:
        """Return the bytes of weights on a device of a pipeline stage, scales of 8-bit weights included."""
        config, start = self.config, self.plan.first_layers[stage]
        total = sum(_layer_bytes(self.plan.layout.local, self.precision.weights[layer], ITEM[self.dtype])
                    for layer in range(start, start + self.plan.stages[stage]))
        first, last = stage == 0, stage == len(self.plan.stages) - 1
        tables = first + (last and not (config.tie_word_embeddings and first))
        return total + tables * self._table_bytes() + last * config.hidden_size * ITEM[self.dtype]

    def _table_bytes(self) -> int:
        """Return the bytes of a device's part of the embedding table, or of the head, which is as large."""
        rows, width = self.plan.layout.vocab // self.plan.tensor, self.config.hidden_size
        return rows * (width + 4) if self.precision.tables else rows * width * ITEM[self.dtype]

    def kv_page_bytes(self, stage: int) -> int:
        """Return the bytes of one cache page, keys and values of a stage's layers, on a device of the stage."""
        start = self.plan.first_layers[stage]
        kinds = (self.precision.kv_cache or (None,) * self.config.num_layers)[start:start + self.plan.stages[stage]]
        return kv_page_bytes(self.plan.layout.local, self.dtype, kinds)

    def state_bytes(self, stage: int, rows: int, seq_len: int) -> dict[str, int]:
        """Return the bytes, by item, of caches and sampler state on a device of a pipeline stage.

        The load is ``rows`` sequences of ``seq_len`` tokens each.

        Items: keys and values, with 16-bit pages for one sequence beside 8-bit ones; summaries for sparse
        attention, where sequences are long enough for it; token counts of the sampler. The null page is included.
        """
        local, layers = self.plan.layout.local, self.plan.stages[stage]
        pages = -(-seq_len // PAGE)
        cache = (rows * pages + 1) * self.kv_page_bytes(stage)
        if self.precision.eight_bit:
            cache += (pages + 1) * kv_page_bytes(local, self.dtype, (None,) * layers)
        summaries = summary_page_bytes(local, self.dtype, layers, pages if seq_len > SPARSE_ABOVE else 0)
        last = stage == len(self.plan.stages) - 1
        return {"kv_cache": cache, "summaries": (rows * pages + 1) * summaries,
                "token_counts": last * (rows + 1) * self.config.vocab_size * 4}

    def step_bytes(self, stage: int, rows: int, tokens: int) -> int:
        """Return the bytes that a step's intermediate arrays take on a device, beside weights and state.

        The step has ``rows`` sequences with ``tokens`` tokens each.

        At its widest, a step holds the MLP's input twice and its two products, or these and their product, or logits.
        A sampler holds five arrays of float32 logits, scoring a prompt two. Both take a few rows at a time.
        """
        local, width, n, tensor = self.plan.layout.local, self.config.hidden_size, rows * tokens, self.plan.tensor
        heads, slots, dim = local.num_heads, local.num_kv_heads, local.head_dim
        halves, scattered = self._divided(rows, tokens)
        own = width / tensor if scattered else width
        widest = max(2 * local.intermediate_size + 2 * (width + own), 3 * local.intermediate_size + width + own,
                     2 * (heads + slots) * dim + width + own)
        hidden = n / halves * ITEM[self.dtype] * (widest + (halves - 1) * own)
        if stage < len(self.plan.stages) - 1:
            return int(hidden)
        logits = max(5 * min(rows, SAMPLED_ROWS), 2 * min(n, SCORED_TOKENS) * (tokens > 1)) * self.config.vocab_size * 4
        return int(max(hidden, logits + n * ITEM[self.dtype] * width))

    def step(self, stage: int, rows: int, tokens: int, context: float) -> StepCost:
        """Return the cost of a pipeline stage's part of a step of ``rows`` sequences with ``tokens`` tokens each.

        context: number of tokens that a token attends to on average. Logits are computed for one position of each
        sequence.
        """
        width, layers = self.config.hidden_size, self.plan.stages[stage]
        first, last = stage == 0, stage == len(self.plan.stages) - 1
        n, tensor, vocab = rows * tokens, self.plan.tensor, self.plan.layout.vocab
        flops = layers * sum(self._operations_of_layer(n, context)) + last * 2 * rows * vocab // tensor * width
        read = self.weight_bytes(stage) - first * self._table_bytes()
        if last and first and self.config.tie_word_embeddings:
            read += self._table_bytes()
        longest = context * 2 if tokens > 1 else context  # a prefill attends to half of what it writes on average
        read += rows * longest * self.kv_page_bytes(stage) / PAGE
        busy = max(flops / self._peak, read / (BANDWIDTH_SHARE * self.hardware.bandwidth))
        if tensor == 1:
            return StepCost(flops, read, collective_bytes=0.0, collectives=0, exchanging=0.0, seconds=busy)
        halves, scattered = self._divided(rows, tokens)
        sums, kinds = 2 * layers + first, 1 + scattered  # scattered: a reduce-scatter and an all-gather for a sum
        sum_bytes = 2 * n * width * ITEM[self.dtype] * (tensor - 1) / tensor
        logit_bytes = last * rows * vocab * 4 * (tensor - 1) / tensor
        exchange = self._exchange(sum_bytes / halves, kinds)  # seconds for the sum of a half
        exposed = 2 * exchange
        if halves == 2:  # beside the other half's attention, twice, and beside the other's MLP, twice
            attention, mlp = (operations / 2 / self._peak for operations in self._operations_of_layer(n, context))
            exposed = 2 * max(0.0, exchange - attention) + 2 * max(0.0, exchange - mlp)
        exchanging = layers * exposed + (first * halves * exchange + last * self._exchange(logit_bytes, 2))
        return StepCost(flops, read, collective_bytes=sums * sum_bytes + logit_bytes,
                        collectives=sums * halves * kinds + 2 * last, exchanging=exchanging, seconds=busy + exchanging)

    @property
    def _peak(self) -> float:
        """Operations per second that matrix products reach on a device: a share of its peak."""
        return COMPUTE_SHARE * self.hardware.peak(
            self.dtype, self.precision.format == "e4m3" and any(self.precision.weights))

    def _divided(self, rows: int, tokens: int) -> tuple[int, bool]:
        """Return the number of micro-batches of a step, and whether devices shard the hidden states."""
        n, tensor = rows * tokens, self.plan.tensor
        many = tensor > 1 and n >= OVERLAP_FROM and self.hardware.overlaps
        halves = 2 if many and tokens % (2 * HALF_MULTIPLE) == 0 else 1
        return halves, tensor > 1 and n >= SCATTER_FROM and tokens % (halves * tensor) == 0

    def _exchange(self, moved: float, collectives: int) -> float:
        """Return the seconds of ``collectives`` in a row that together move ``moved`` bytes over each link."""
        return moved / (LINK_SHARE * self.hardware.link) + collectives * self.hardware.collective_seconds

    def _operations_of_layer(self, n: int, context: float) -> tuple[float, float]:
        """Return a layer's operations on a device for n tokens: of attention with its projections, and of the MLP."""
        local = self.plan.layout.local
        mlp = 3 * local.hidden_size * local.intermediate_size
        attention = 4 * context * local.num_heads * local.head_dim
        return n * (2 * (_products(local) - mlp) + attention), n * 2 * mlp

    def seconds(self, rows: int, tokens: int, context: float) -> float:
        """Return the seconds that a step of ``rows`` sequences takes to pass through all pipeline stages."""
        return sum(self.step(stage, rows, tokens, context).seconds + self._passing(rows * tokens)
                   for stage in range(len(self.plan.stages)))

    def _passing(self, tokens: int) -> float:
        """Return the seconds to hand the hidden states of ``tokens`` tokens to the next pipeline stage."""
        if len(self.plan.stages) == 1:
            return 0.0
        return self._exchange(tokens * self.config.hidden_size * ITEM[self.dtype], 1)


def _products(local: ModelConfig) -> int:
    """Return the number of elements of a layer's matrices on a device: the multiplications for each token."""
    heads, slots, width = local.num_heads, local.num_kv_heads, local.hidden_size
    return width * (2 * heads * local.head_dim + 2 * slots * local.head_dim + 3 * local.intermediate_size)


def _layer_bytes(local: ModelConfig, eight_bit: bool, item: int) -> int:
    """Return the bytes of a layer's weights on a device. item: bytes of an element that is not 8-bit."""
    heads, slots, dim = local.num_heads, local.num_kv_heads, local.head_dim
    width, inner = local.hidden_size, local.intermediate_size
    plain = (heads + 2 * slots) * dim + 2 * width  # biases and norms
    if not eight_bit:
        return (_products(local) + plain) * item
    outputs = ((heads + 2 * slots) * dim, width, 2 * inner, width)  # each with a float32 scale
    return _products(local) + 4 * sum(outputs) + plain * item
