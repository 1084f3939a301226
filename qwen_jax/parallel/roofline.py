"""What a step of a plan costs: operations, bytes and seconds on each device.

A roofline (Williams et al., 2009): a step takes as long as its operations at the device's peak or its bytes at the
memory's bandwidth, whichever is longer, and then its collectives. Where tokens go through the layers in two halves, a
half's collective takes only what is longer than the other half's computing beside it (see `model.partition`).
A ring moves ``2 (t - 1) / t`` of an all-reduce's bytes over each of t devices' links, half as much for an all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import nodes_per_page

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.hardware import BANDWIDTH_SHARE, COMPUTE_SHARE, LINK_SHARE, Hardware
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision

ITEM = {"bfloat16": 2, "float32": 4}
# As the engine has them, which stands above this: tokens of a sequence beyond which attention is sparse, tokens of a
# step that are divided over the devices between products and from which they go in halves, rows that are sampled and
# positions that are scored at once.
SPARSE_ABOVE, SCATTER_FROM, OVERLAP_FROM, SAMPLED_ROWS, SCORED_TOKENS = 2048, 1024, 2048, 32, 64
HALF_MULTIPLE = 128  # as `model.partition` has it


@dataclass(frozen=True)
class Step:
    """Of one stage's devices, each.

    Attributes:
      flops: floating-point operations; bytes: read from memory; collective_bytes: over each link.
      collectives: how many, and exchanging: seconds of them that nothing hides.
      seconds: in all.
    """

    flops: float
    bytes: float
    collective_bytes: float
    collectives: int
    exchanging: float
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

    def state_bytes(self, stage: int, rows: int, seq_len: int) -> dict[str, int]:
        """Of one device of a stage, by item, for ``rows`` sequences of ``seq_len`` tokens each, and the null page: keys
        and values, with room for one sequence in 16 bits where they are 8-bit; what sparse attention selects by, where
        sequences are long enough for it; and what the sampler counts."""
        local, item, layers = self.plan.layout.local, ITEM[self.dtype], self.plan.stages[stage]
        pages, channels = -(-seq_len // PAGE), local.num_kv_heads * local.head_dim
        cache = (rows * pages + 1) * PAGE * self.kv_bytes_per_token(stage)
        if self.precision.eight_bit:
            cache += (pages + 1) * PAGE * layers * 2 * channels * item
        nodes = 2 * nodes_per_page(pages) if seq_len > SPARSE_ABOVE else 0
        last = stage == len(self.plan.stages) - 1
        return {"kv_cache": cache, "summaries": (rows * pages + 1) * layers * nodes * channels * item,
                "token_counts": last * (rows + 1) * self.config.vocab_size * 4}

    def step_bytes(self, stage: int, rows: int, tokens: int) -> int:
        """What a step of ``rows`` with ``tokens`` each holds on one device beside weights and state, at its widest: the
        MLP's input twice and its two products, or these and their product, or logits.

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

    def step(self, stage: int, rows: int, tokens: int, context: float) -> Step:
        """One stage's part of a step of ``rows`` with ``tokens`` each, which attend to ``context`` tokens on average.

        Logits are of one position for each row.
        """
        width, count = self.config.hidden_size, self.plan.stages[stage]
        first, last = stage == 0, stage == len(self.plan.stages) - 1
        n, item, tensor = rows * tokens, ITEM[self.dtype], self.plan.tensor
        vocab = self.plan.layout.vocab
        flops = count * sum(self._operations_of_layer(n, context))
        flops += last * 2 * rows * vocab // tensor * width
        read = self.weight_bytes(stage) - first * self._table_bytes()
        if last and first and self.config.tie_word_embeddings:
            read += self._table_bytes()
        longest = context * 2 if tokens > 1 else context  # a prefill attends to half of what it writes on average
        read += rows * longest * self.kv_bytes_per_token(stage)
        peak = COMPUTE_SHARE * self.hardware.peak(self.dtype, any(self.precision.weights))
        busy = max(flops / peak, read / (BANDWIDTH_SHARE * self.hardware.bandwidth))
        if tensor == 1:
            return Step(flops, read, 0.0, 0, 0.0, busy)
        halves, scattered = self._divided(rows, tokens)
        sums, kinds = 2 * count + first, 1 + scattered  # scattered: a reduce-scatter and an all-gather for a sum
        a_sum = 2 * n * width * item * (tensor - 1) / tensor
        logits = last * rows * vocab * 4 * (tensor - 1) / tensor
        beside = first * halves * self._exchange(a_sum / halves, kinds) + last * self._exchange(logits, 2)
        one = self._exchange(a_sum / halves, kinds)
        if halves == 2:  # beside the other half's attention, twice, and beside the other's MLP, twice
            attention, mlp = (each / 2 / peak for each in self._operations_of_layer(n, context))
            layer = 2 * max(0.0, one - attention) + 2 * max(0.0, one - mlp)
        else:
            layer = 2 * one
        exchanging = count * layer + beside
        return Step(flops, read, sums * a_sum + logits, sums * halves * kinds + 2 * last, exchanging, busy + exchanging)

    def _divided(self, rows: int, tokens: int) -> tuple[int, bool]:
        """In how many parts a step's tokens go through the layers, and whether devices divide them between products."""
        n, tensor = rows * tokens, self.plan.tensor
        many = tensor > 1 and n >= OVERLAP_FROM and self.hardware.overlaps
        halves = 2 if many and tokens % (2 * HALF_MULTIPLE) == 0 else 1
        return halves, tensor > 1 and n >= SCATTER_FROM and tokens % (halves * tensor) == 0

    def _exchange(self, moved: float, collectives: int) -> float:
        """Seconds of some collectives, one after another, that move so many bytes over each link."""
        return moved / (LINK_SHARE * self.hardware.link) + collectives * self.hardware.collective_seconds

    def _operations_of_layer(self, n: int, context: float) -> tuple[float, float]:
        """Of one layer on one device, for n tokens: attention with its products, and the MLP."""
        local = self.plan.layout.local
        mlp = 3 * local.hidden_size * local.intermediate_size
        attention = 4 * context * local.num_heads * local.head_dim
        return n * (2 * (_products(local) - mlp) + attention), n * 2 * mlp

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
        return self._exchange(tokens * self.config.hidden_size * ITEM[self.dtype], 1)


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
