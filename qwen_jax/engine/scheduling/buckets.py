"""Buckets, the kinds and shapes of steps for which programs are compiled, and the choice of a prefill step's bucket."""

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_jax.engine.scheduling.page_pool import PAGE, pages_for
from qwen_jax.engine.scheduling.schedule_policy import (
    DEFAULT_POLICY,
    FULL,
    RECOMPUTE,
    SPARSE,
    SchedulePolicy,
    check_positive,
)
from qwen_jax.errors import UserError

EIGHT_BIT = "8-bit"
MAX_BUCKETS = 64
STEP_OVERHEAD_TOKENS = 64  # the fixed cost of a step (dispatch, reading the weights once), in prefill tokens
DECODE_STEPS = 8  # tokens per row that a decode program can generate; each dispatch decides how many it does
INVARIANT_PREFILL_TOKENS = 256  # chunk of a prompt in a batch-invariant engine
# XLA:CPU's bf16 dot with one row is 10 times slower than with two, and elsewhere a padding row costs nothing. Eight
# rows cost little more than four: one program less to compile.
_DECODE_ROWS = (2, *(2**n for n in range(3, 20)))


@dataclass(frozen=True)
class Bucket:
    """Kind and shape of a step, for which a program is compiled: tokens [rows, tokens], page table [rows, pages]."""

    phase: str  # "prefill" or "decode"
    schedule: str  # `FULL`, `SPARSE` or `RECOMPUTE`
    rows: int  # sequences in one step
    tokens: int  # tokens per row. In decode 1, or 1 + the number of drafts that the step checks.
    pages: int  # width of the page table
    precision: str = "bf16"  # "bf16", "f32" or "8-bit": of weights, pages or both
    micro_rows: int = 0  # rows per micro-batch inside the executable; 0 means all rows at once
    steps: int = 1  # in decode, tokens per row that one dispatch can generate one after another
    chunk_pages: int = 0  # pages of keys that full attention reads at a time; 0 leaves it to the kernel

    def __post_init__(self):
        if self.micro_rows == 0:
            object.__setattr__(self, "micro_rows", self.rows)
        if self.rows % self.micro_rows:
            raise ValueError(f"{self.rows} rows do not split into micro-batches of {self.micro_rows}")

    def __str__(self) -> str:
        name = f"{self.phase}/{self.schedule} {self.rows}x{self.tokens}"
        return f"{name} {EIGHT_BIT}" if self.precision == EIGHT_BIT else name


@dataclass(frozen=True)
class Limits:
    """Largest sizes that an engine accepts, and the shapes of steps that it compiles programs for."""

    max_batch_size: int  # sequences that run at once
    max_seq_len: int  # tokens of one sequence, prompt and output together
    prefill_shapes: tuple[tuple[int, int], ...]  # (rows, tokens) of prefills in full attention
    recompute_shapes: tuple[tuple[int, int, int], ...]  # (rows, tokens, micro_rows) of prefills in micro-batches
    decode_rows: tuple[int, ...]  # rows of decode steps
    decode_steps: int = 1  # maximum tokens per row and dispatch
    draft_tokens: int = 0  # drafts per row that a decode step can check; 0 for no speculation
    draft_rows: int = 8  # maximum rows of a decode step with drafts
    sparse_prefill_shapes: tuple[tuple[int, int], ...] = ()  # of the sparse schedule; empty for `prefill_shapes`
    sparse_decode_rows: tuple[int, ...] = ()  # of the sparse schedule; empty for `decode_rows`
    step_overhead_tokens: int = STEP_OVERHEAD_TOKENS  # see `pick_prefill`
    prefill_chunk_pages: int = 0  # `Bucket.chunk_pages` of full-attention prefills
    decode_chunk_pages: int = 0  # `Bucket.chunk_pages` of full-attention decode steps

    def __post_init__(self):
        check_positive(max_batch_size=self.max_batch_size, max_seq_len=self.max_seq_len, decode_steps=self.decode_steps,
                       draft_rows=self.draft_rows, step_overhead_tokens=self.step_overhead_tokens)
        if self.draft_tokens:
            check_positive(draft_tokens=self.draft_tokens)
        if not self.prefill_shapes or not self.decode_rows:
            raise UserError("limits need at least one prefill shape and one number of decode rows")
        for _, tokens, *_ in (*self.prefill_shapes, *self.recompute_shapes, *self.sparse_prefill_shapes):
            if tokens % PAGE:  # chunks start at page boundaries because every full chunk is whole pages
                raise UserError(f"prefill shapes must be whole pages: {tokens} tokens is not a multiple of {PAGE}")


@dataclass(frozen=True)
class Grid:
    """Candidate shapes of steps, for engines of any size; `default_limits` keeps those that an engine can use."""

    prefill_shapes: tuple[tuple[int, int], ...]  # (rows, tokens) of prefills in full attention
    sparse_prefill_shapes: tuple[tuple[int, int], ...]  # (rows, tokens) of prefills in sparse attention
    recompute_shapes: tuple[tuple[int, int], ...]  # (tokens, micro_rows) of prefills in micro-batches
    decode_rows: tuple[int, ...] = _DECODE_ROWS  # rows of decode steps, ascending; no step has more rows than the last
    sparse_decode_rows: tuple[int, ...] = (2, 8)  # for sparse attention; a step for all sequences is always added
    decode_steps: int = DECODE_STEPS  # maximum tokens per row and dispatch
    step_overhead_tokens: int = STEP_OVERHEAD_TOKENS  # see `pick_prefill`
    prefill_chunk_pages: int = 0  # `Bucket.chunk_pages` of full-attention prefills
    decode_chunk_pages: int = 0  # `Bucket.chunk_pages` of full-attention decode steps


# On CPU matmuls saturate near 512 rows, and one dispatch should stay short for the decoding neighbours. Long prompts
# (the sparse ones) come one or two at a time and in large chunks: few shapes do, and each is a program to compile.
_CPU_GRID = Grid(prefill_shapes=((1, 64), (8, 64), (4, 128), (1, 256), (2, 256), (1, 512)),
                 sparse_prefill_shapes=((1, 64), (1, 512)), recompute_shapes=((64, 8),))
_ACCELERATOR_GRID = Grid(
    prefill_shapes=((1, 64), (8, 64), (32, 64), (1, 256), (8, 256), (32, 256), (1, 1024), (8, 1024), (1, 4096),
                    (2, 4096)),
    sparse_prefill_shapes=((1, 64), (1, 1024), (2, 4096)), recompute_shapes=((64, 32), (256, 32)))


def default_grid(platform: str) -> Grid:
    """Return the candidate shapes of steps for a platform: "cpu", "gpu" or "tpu"."""
    if platform not in ("cpu", "gpu", "tpu"):
        raise UserError(f"platform must be 'cpu', 'gpu' or 'tpu', not {platform!r}")
    return _CPU_GRID if platform == "cpu" else _ACCELERATOR_GRID


def default_limits(max_batch_size: int = 64, max_seq_len: int = 4096, platform: str = "cpu",
                   policy: SchedulePolicy = DEFAULT_POLICY, draft_tokens: int = 0,
                   decode_steps: int | None = None, grid: Grid | None = None) -> Limits:
    """Return the limits of an engine: those shapes of a grid that it can use with these two sizes and this policy.

    decode_steps: by default the grid's. grid: by default the platform's ("cpu", "gpu" or "tpu").
    """
    check_positive(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    grid = grid or default_grid(platform)
    longest = pages_for(max_seq_len) * PAGE
    prefill_rows = min(max_batch_size, policy.recompute_above_rows)
    running = _round_up(max_batch_size, grid.decode_rows[0])

    def prefill_shapes(shapes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return _unique((min(rows, prefill_rows), tokens) for rows, tokens in shapes if tokens <= longest)

    recompute = []
    for rows in _below_and(_DECODE_ROWS, running) if max_batch_size > policy.recompute_above_rows else ():
        for tokens, micro_rows in grid.recompute_shapes:
            micro_rows = min(micro_rows, policy.recompute_above_rows)
            if rows > policy.recompute_above_rows and tokens <= longest:
                recompute.append((_round_up(rows, micro_rows), tokens, micro_rows))
    return Limits(max_batch_size, max_seq_len, prefill_shapes=prefill_shapes(grid.prefill_shapes),
                  recompute_shapes=_unique(recompute),
                  decode_rows=_below_and(grid.decode_rows, min(running, grid.decode_rows[-1])),
                  decode_steps=decode_steps or grid.decode_steps, draft_tokens=draft_tokens,
                  sparse_prefill_shapes=prefill_shapes(grid.sparse_prefill_shapes),
                  sparse_decode_rows=_below_and(grid.sparse_decode_rows, running),
                  step_overhead_tokens=grid.step_overhead_tokens, prefill_chunk_pages=grid.prefill_chunk_pages,
                  decode_chunk_pages=grid.decode_chunk_pages)


def invariant_limits(max_batch_size: int, max_seq_len: int, decode_steps: int = DECODE_STEPS) -> Limits:
    """Return limits with one prefill and one decode shape, so that a row's results do not depend on other rows."""
    check_positive(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    chunk = min(INVARIANT_PREFILL_TOKENS, pages_for(max_seq_len) * PAGE)
    return Limits(max_batch_size, max_seq_len, prefill_shapes=((1, chunk),), recompute_shapes=(),
                  decode_rows=(_round_up(max_batch_size, _DECODE_ROWS[0]),), decode_steps=decode_steps)


def bucket_table(limits: Limits, policy: SchedulePolicy = DEFAULT_POLICY, precision: str = "bf16",
                 eight_bit: bool = False) -> tuple[Bucket, ...]:
    """Return every bucket that an engine with these limits may run, in the order of their warm-up.

    Sparse buckets exist only if a prompt can be long enough for them, recompute ones (prefills in micro-batches) only
    if a batch can be large enough. UserError when the limits leave a schedule of the policy without a bucket, or need
    over `MAX_BUCKETS`.

    eight_bit: make all of them 8-bit, and add a few in ``precision`` for requests whose numbers do not fit into 8 bits.
    """
    if precision not in ("bf16", "f32"):
        raise UserError(f"precision must be 'bf16' or 'f32', not {precision!r}")
    recompute_shapes = _recompute_shapes(limits, policy.recompute_above_rows)
    usual = EIGHT_BIT if eight_bit else precision
    buckets = [Bucket("prefill", RECOMPUTE, rows, tokens, pages_for(limits.max_seq_len), precision=usual,
                      micro_rows=micro_rows, chunk_pages=limits.prefill_chunk_pages)
               for rows, tokens, micro_rows in recompute_shapes]
    buckets += _attention_buckets(limits, FULL, usual)
    if limits.max_seq_len > policy.sparse_above_tokens:
        buckets += _attention_buckets(limits, SPARSE, usual)
    if eight_bit:
        buckets += _fallback_buckets(limits, precision)
    order = ("prefill", "decode", FULL, RECOMPUTE, SPARSE)
    buckets.sort(key=lambda b: (b.precision != usual, order.index(b.phase), order.index(b.schedule), b.rows * b.tokens,
                                b.rows))
    table = _unique(buckets)
    if len(table) > MAX_BUCKETS:
        raise UserError(f"these limits need {len(table)} executables, over {MAX_BUCKETS}: give fewer shapes")
    return table


def pick_prefill(candidates: tuple[Bucket, ...], remaining_lengths: list[int],
                 overhead_tokens: int = STEP_OVERHEAD_TOKENS) -> Bucket:
    """Return the bucket whose prefill computes the most prompt tokens in proportion to its cost.

    `remaining_lengths`: tokens still to prefill per row, head of the line first. Every bucket takes the first `rows`
    of them, so the head always runs. Cost: padded tokens and `overhead_tokens`. Ties go to the first candidate,
    in a bucket table the one with the fewest tokens.
    """
    if not candidates or not remaining_lengths:
        raise ValueError("pick_prefill needs a bucket and a row")

    def value(bucket: Bucket) -> float:
        useful = sum(min(length, bucket.tokens) for length in remaining_lengths[:bucket.rows])
        return useful / (bucket.rows * bucket.tokens + overhead_tokens)

    return max(candidates, key=value)


def _recompute_shapes(limits: Limits, threshold: int) -> tuple[tuple[int, int, int], ...]:
    """Return the shapes (rows, tokens, micro_rows) of prefills in micro-batches, for batches of over ``threshold``.

    UserError where the limits' shapes contradict the threshold.
    """
    if any(rows > threshold for rows, _ in limits.prefill_shapes):
        raise UserError(f"a prefill shape has over {threshold} rows, where the policy asks for recompute: "
                        "move it to recompute_shapes or raise recompute_above_rows")
    if limits.max_batch_size <= threshold:
        return ()
    if any(rows <= threshold for rows, _, _ in limits.recompute_shapes):
        raise UserError(f"every recompute shape must have over {threshold} rows (recompute_above_rows)")
    if not limits.recompute_shapes:
        raise UserError(f"max_batch_size={limits.max_batch_size} can exceed recompute_above_rows={threshold}, "
                        "but the limits have no recompute shape")
    return limits.recompute_shapes


def _attention_buckets(limits: Limits, attention: str, precision: str) -> list[Bucket]:
    """Return the prefill, decode and draft-checking buckets of the full or the sparse schedule."""
    prefill_shapes, decode_rows = limits.prefill_shapes, limits.decode_rows
    prefill_chunk, decode_chunk = limits.prefill_chunk_pages, limits.decode_chunk_pages
    if attention == SPARSE:
        prefill_shapes = limits.sparse_prefill_shapes or prefill_shapes
        decode_rows = limits.sparse_decode_rows or decode_rows
        prefill_chunk = decode_chunk = 0
    pages = pages_for(limits.max_seq_len)
    buckets = [Bucket("prefill", attention, *shape, pages, precision=precision, chunk_pages=prefill_chunk)
               for shape in prefill_shapes]
    buckets += [Bucket("decode", attention, rows, 1, pages, precision=precision, steps=limits.decode_steps,
                       chunk_pages=decode_chunk) for rows in decode_rows]
    if limits.draft_tokens:
        buckets += [Bucket("decode", attention, rows, limits.draft_tokens + 1, pages, precision=precision)
                    for rows in decode_rows if rows <= limits.draft_rows]
    return buckets


def _fallback_buckets(limits: Limits, precision: str) -> list[Bucket]:
    """Return the few 16-bit buckets that an 8-bit engine falls back to: two prefills and a decode step.

    The prefills are the shortest and the longest of those with the fewest rows.
    """
    pages, rows = pages_for(limits.max_seq_len), min(limits.prefill_shapes)[0]
    lengths = sorted(tokens for shape_rows, tokens in limits.prefill_shapes if shape_rows == rows)
    prefills = [Bucket("prefill", FULL, rows, tokens, pages, precision=precision)
                for tokens in (lengths[0], lengths[-1])]
    return [*prefills, Bucket("decode", FULL, min(limits.decode_rows), 1, pages, precision=precision,
                              steps=limits.decode_steps)]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _below_and(sizes: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Return the sizes below ``last``, and ``last``."""
    return *(size for size in sizes if size < last), last


def _unique(items: Iterable) -> tuple:
    return tuple(dict.fromkeys(items))
