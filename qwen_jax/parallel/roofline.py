"""What a step of a plan costs: operations, bytes and seconds on each device.

A roofline (Williams et al., 2009): a step takes as long as its operations at the device's peak or its bytes at the
memory's bandwidth, whichever is longer, and then its collectives, which are not counted as overlapping with anything.
A ring moves ``2 (t - 1) / t`` of an all-reduce's bytes over each of t devices' links, half as much for an all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.hardware import BANDWIDTH_SHARE, COMPUTE_SHARE, LINK_SHARE, Hardware
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision

ITEM = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Step:
    """Of one stage's devices, each: floating-point operations, bytes read from memory, and seconds by cause."""

    flops: float
    bytes: float
    collective_bytes: float
    collectives: int
    seconds: float


@dataclass(frozen=True)
class Work:
    """A model in a precision on a plan's devices.

    Attributes:
      dtype: "bfloat16" or "float32", of everything that is not 8-bit.
    """

    config: ModelConfig
    plan: ParallelPlan
    hardware: Hardware
    precision: Precision
    dtype: str = "bfloat16"

    def weight_bytes(self, stage: int) -> int:
        """That one device of a stage holds, scales of 8-bit weights included."""
        config, start = self.config, self.plan.first_layers[stage]
        total = sum(_layer_bytes(self.plan.layout.local, self.precision.weights[layer], ITEM[self.dtype])
                    for layer in range(start, start + self.plan.stages[stage]))
        first, last = stage == 0, stage == len(self.plan.stages) - 1
        tables = first + (last and not (config.tie_word_embeddings and first))
        return total + tables * self._table_bytes() + last * config.hidden_size * ITEM[self.dtype]

    def _table_bytes(self) -> int:
        rows, width = self.plan.layout.vocab // self.plan.tensor, self.config.hidden_size
        return rows * (width + 4) if self.precision.tables else rows * width * ITEM[self.dtype]

    def kv_bytes_per_token(self, stage: int) -> int:
        """Keys and values of one token on one device of a stage."""
        local, start = self.plan.layout.local, self.plan.first_layers[stage]
        kinds = (self.precision.kv_cache or (None,) * self.config.num_layers)[start:start + self.plan.stages[stage]]
        return sum(2 * local.num_kv_heads * local.head_dim * (1 if kind else ITEM[self.dtype]) for kind in kinds)

    def step(self, stage: int, rows: int, tokens: int, context: float) -> Step:
        """One stage's part of a step of ``rows`` with ``tokens`` each, which attend to ``context`` tokens on average.

        Logits are of one position for each row.
        """
        local, width, count = self.plan.layout.local, self.config.hidden_size, self.plan.stages[stage]
        first, last = stage == 0, stage == len(self.plan.stages) - 1
        n, item, tensor = rows * tokens, ITEM[self.dtype], self.plan.tensor
        vocab = self.plan.layout.vocab
        flops = count * n * (2 * _products(local) + 4 * context * local.num_heads * local.head_dim)
        flops += last * 2 * rows * vocab // tensor * width
        read = self.weight_bytes(stage) - first * self._table_bytes()
        if last and first and self.config.tie_word_embeddings:
            read += self._table_bytes()
        longest = context * 2 if tokens > 1 else context  # a prefill attends to half of what it writes on average
        read += rows * longest * self.kv_bytes_per_token(stage)
        sums = (2 * count + first) * n * width * item
        logits = last * rows * vocab * 4
        moved = (2 * sums + logits) * (tensor - 1) / tensor
        collectives = (2 * count + first + 2 * last) if tensor > 1 else 0
        eight_bit = any(self.precision.weights)
        seconds = max(flops / (COMPUTE_SHARE * self.hardware.peak(self.dtype, eight_bit)),
                      read / (BANDWIDTH_SHARE * self.hardware.bandwidth))
        seconds += moved / (LINK_SHARE * self.hardware.link) + collectives * self.hardware.collective_seconds
        return Step(flops, read, moved, collectives, seconds)

    def seconds(self, rows: int, tokens: int, context: float, micro_batches: int = 1) -> float:
        """Until all rows of a step are through all stages, in ``micro_batches`` of as many rows each."""
        stages = range(len(self.plan.stages))
        size = -(-rows // micro_batches)
        each = [self.step(stage, size, tokens, context).seconds + self._passing(size * tokens) for stage in stages]
        return sum(each) + (micro_batches - 1) * max(each)

    def _passing(self, tokens: int) -> float:
        """Seconds to hand hidden states to the next stage."""
        if len(self.plan.stages) == 1:
            return 0.0
        size = tokens * self.config.hidden_size * ITEM[self.dtype]
        return size / (LINK_SHARE * self.hardware.link) + self.hardware.collective_seconds


def _products(local: ModelConfig) -> int:
    """Elements of one layer's matrices on one device: as many multiplications for each token."""
    heads, slots, width = local.num_heads, local.num_kv_heads, local.hidden_size
    return width * (2 * heads * local.head_dim + 2 * slots * local.head_dim + 3 * local.intermediate_size)


def _layer_bytes(local: ModelConfig, eight_bit: bool, item: int) -> int:
    heads, slots, dim = local.num_heads, local.num_kv_heads, local.head_dim
    width, inner = local.hidden_size, local.intermediate_size
    plain = (heads + 2 * slots) * dim + 2 * width  # biases and norms
    if not eight_bit:
        return (_products(local) + plain) * item
    outputs = ((heads + 2 * slots) * dim, width, 2 * inner, width)  # each with a float32 scale
    return _products(local) + 4 * sum(outputs) + plain * item


def parameter_count(config: ModelConfig) -> int:
    """Of the whole model, unpadded."""
    layers = config.num_layers * (_products(config) + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
                                  + 2 * config.hidden_size)
    tables = (2 - config.tie_word_embeddings) * config.vocab_size
    return layers + (tables + 1) * config.hidden_size
