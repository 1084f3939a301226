"""Which executables exist, and which one a step uses: the schedule policy and the bucket table, as plain data."""

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


@dataclass(frozen=True)
class Bucket:
    """Everything that changes an executable. Shapes: tokens [rows, tokens], page table [rows, pages]."""

    phase: str  # "prefill" | "decode"
    schedule: str  # FULL | SPARSE | RECOMPUTE
    rows: int
    tokens: int  # per row; in decode 1, or more to check that many less one drafts
    pages: int  # width of the page table
    precision: str = "bf16"  # "bf16" | "f32" | "8-bit", of weights, pages or both
    micro_rows: int = 0  # rows per micro-batch inside the executable; 0 means all rows at once
    steps: int = 1  # decode: tokens per row that one dispatch can generate one after another
    chunk_pages: int = 0  # pages of keys that full attention takes at a time; 0 for the kernel's own number

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
    """What an engine accepts, and the shapes it is compiled for."""

    max_batch_size: int  # running sequences
    max_seq_len: int  # prompt and output of one sequence, in tokens
    prefill_shapes: tuple[tuple[int, int], ...]  # (rows, tokens)
    recompute_shapes: tuple[tuple[int, int, int], ...]  # (rows, tokens, micro_rows)
    decode_rows: tuple[int, ...]
    decode_steps: int = 1  # most tokens per row and dispatch
    draft_tokens: int = 0  # drafts that a decode step can check; 0 for no speculation
    draft_rows: int = 8  # no speculation with more rows
    sparse_prefill_shapes: tuple[tuple[int, int], ...] = ()  # for the sparse schedule; empty for the same
    sparse_decode_rows: tuple[int, ...] = ()
    step_overhead_tokens: int = STEP_OVERHEAD_TOKENS
    prefill_chunk_pages: int = 0  # as `Bucket.chunk_pages`
    decode_chunk_pages: int = 0

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


DECODE_STEPS = 8  # how many of them a dispatch takes is decided when it starts
# XLA:CPU's bf16 dot with one row is 10 times slower than with two, and elsewhere a padding row costs nothing. Eight
# rows cost little more than four: one program less to compile.
_DECODE_ROWS = (2, *(2**n for n in range(3, 20)))


@dataclass(frozen=True)
class Grid:
    """Shapes to choose from, whatever an engine's sizes: `default_limits` cuts them down to what these can use.

    Attributes:
      prefill_shapes, sparse_prefill_shapes: (rows, tokens). recompute_shapes: (tokens, micro_rows).
      decode_rows: ascending; no step has more rows than the last. sparse_decode_rows: and as many as there may be.
      decode_steps: most tokens per row and dispatch.
      step_overhead_tokens: what a step costs beside its tokens, in prefill tokens (`pick_prefill`).
      prefill_chunk_pages, decode_chunk_pages: as `Bucket.chunk_pages`.
    """

    prefill_shapes: tuple[tuple[int, int], ...]
    sparse_prefill_shapes: tuple[tuple[int, int], ...]
    recompute_shapes: tuple[tuple[int, int], ...]
    decode_rows: tuple[int, ...] = _DECODE_ROWS
    sparse_decode_rows: tuple[int, ...] = (2, 8)
    decode_steps: int = DECODE_STEPS
    step_overhead_tokens: int = STEP_OVERHEAD_TOKENS
    prefill_chunk_pages: int = 0
    decode_chunk_pages: int = 0


# On CPU matmuls saturate near 512 rows, and one dispatch should stay short for the decoding neighbours. Long prompts
# (the sparse ones) come one or two at a time and in large chunks: few shapes do, and each is a program to compile.
_CPU_GRID = Grid(((1, 64), (8, 64), (4, 128), (1, 256), (2, 256), (1, 512)), ((1, 64), (1, 512)), ((64, 8),))
_ACCELERATOR_GRID = Grid(((1, 64), (8, 64), (32, 64), (1, 256), (8, 256), (32, 256), (1, 1024), (8, 1024), (1, 4096),
                          (2, 4096)), ((1, 64), (1, 1024), (2, 4096)), ((64, 32), (256, 32)))


def default_grid(platform: str) -> Grid:
    """For "cpu", "gpu" or "tpu"."""
    if platform not in ("cpu", "gpu", "tpu"):
        raise UserError(f"unknown platform {platform!r}: use 'cpu', 'gpu' or 'tpu'")
    return _CPU_GRID if platform == "cpu" else _ACCELERATOR_GRID


def default_limits(max_batch_size: int = 64, max_seq_len: int = 4096, platform: str = "cpu",
                   policy: SchedulePolicy = DEFAULT_POLICY, draft_tokens: int = 0,
                   decode_steps: int | None = None, grid: Grid | None = None) -> Limits:
    """The shapes for a platform ("cpu", "gpu" or "tpu"), cut down to what the two sizes and the policy can use.

    decode_steps: by default the grid's. grid: by default the platform's.
    """
    check_positive(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    grid = grid or default_grid(platform)
    longest = pages_for(max_seq_len) * PAGE
    most_rows = min(max_batch_size, policy.recompute_above_rows)
    prefill = [(min(rows, most_rows), tokens) for rows, tokens in grid.prefill_shapes if tokens <= longest]
    running = _round_up(max_batch_size, _DECODE_ROWS[0])
    decode_rows = _up_to(grid.decode_rows, min(running, grid.decode_rows[-1]))
    recompute = []
    for rows in _up_to(_DECODE_ROWS, running) if max_batch_size > policy.recompute_above_rows else ():
        for tokens, micro_rows in grid.recompute_shapes:
            micro_rows = min(micro_rows, policy.recompute_above_rows)
            if rows > policy.recompute_above_rows and tokens <= longest:
                recompute.append((_round_up(rows, micro_rows), tokens, micro_rows))
    sparse_prefill = [(min(rows, most_rows), tokens) for rows, tokens in grid.sparse_prefill_shapes
                      if tokens <= longest]
    return Limits(max_batch_size, max_seq_len, _unique(prefill), _unique(recompute), decode_rows,
                  decode_steps or grid.decode_steps, draft_tokens, sparse_prefill_shapes=_unique(sparse_prefill),
                  sparse_decode_rows=_up_to(grid.sparse_decode_rows, running),
                  step_overhead_tokens=grid.step_overhead_tokens, prefill_chunk_pages=grid.prefill_chunk_pages,
                  decode_chunk_pages=grid.decode_chunk_pages)


def invariant_limits(max_batch_size: int, max_seq_len: int, decode_steps: int = DECODE_STEPS,
                     tokens: int = 256) -> Limits:
    """One shape for each phase, so that what shares a step with a sequence cannot change how it is computed."""
    check_positive(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    return Limits(max_batch_size, max_seq_len, ((1, min(tokens, pages_for(max_seq_len) * PAGE)),), (),
                  (_round_up(max_batch_size, _DECODE_ROWS[0]),), decode_steps)


def bucket_table(limits: Limits, policy: SchedulePolicy = DEFAULT_POLICY, precision: str = "bf16",
                 eight_bit: bool = False) -> tuple[Bucket, ...]:
    """Every bucket the engine may run, in the order they are warmed up: the only enumeration there is.

    Sparse buckets exist only if a prompt can be long enough for them, recompute ones only if a batch can be large
    enough. UserError when the limits leave a schedule of the policy without a bucket, or need over `MAX_BUCKETS`.

    eight_bit: all of them in 8 bits, and a few in ``precision`` for requests that 8 bits cannot compute.
    """
    if precision not in ("bf16", "f32"):
        raise UserError(f"unknown precision {precision!r}: use 'bf16' or 'f32'")
    usual = EIGHT_BIT if eight_bit else precision
    threshold = policy.recompute_above_rows
    if any(rows > threshold for rows, _ in limits.prefill_shapes):
        raise UserError(f"a prefill shape has over {threshold} rows, where the policy asks for recompute: "
                        "move it to recompute_shapes or raise recompute_above_rows")
    recompute_shapes = limits.recompute_shapes if limits.max_batch_size > threshold else ()
    if any(rows <= threshold for rows, _, _ in recompute_shapes):
        raise UserError(f"every recompute shape must have over {threshold} rows (recompute_above_rows)")
    if limits.max_batch_size > threshold and not recompute_shapes:
        raise UserError(f"max_batch_size={limits.max_batch_size} can exceed recompute_above_rows={threshold}, "
                        "but the limits have no recompute shape")

    pages = pages_for(limits.max_seq_len)
    attentions = (FULL, SPARSE) if limits.max_seq_len > policy.sparse_above_tokens else (FULL,)
    buckets = [Bucket("prefill", RECOMPUTE, rows, tokens, pages, usual, micro, chunk_pages=limits.prefill_chunk_pages)
               for rows, tokens, micro in recompute_shapes]
    for attention in attentions:
        sparse = attention == SPARSE
        shapes = limits.sparse_prefill_shapes if sparse and limits.sparse_prefill_shapes else limits.prefill_shapes
        decode_rows = limits.sparse_decode_rows if sparse and limits.sparse_decode_rows else limits.decode_rows
        chunks = (0, 0) if sparse else (limits.prefill_chunk_pages, limits.decode_chunk_pages)
        buckets += [Bucket("prefill", attention, *shape, pages, usual, chunk_pages=chunks[0]) for shape in shapes]
        buckets += [Bucket("decode", attention, rows, 1, pages, usual, steps=limits.decode_steps,
                           chunk_pages=chunks[1]) for rows in decode_rows]
        if limits.draft_tokens:
            buckets += [Bucket("decode", attention, rows, limits.draft_tokens + 1, pages, usual)
                        for rows in decode_rows if rows <= limits.draft_rows]
    if eight_bit:
        single = sorted(tokens for rows, tokens in limits.prefill_shapes if rows == min(limits.prefill_shapes)[0])
        shapes = _unique((min(limits.prefill_shapes)[0], tokens) for tokens in (single[0], single[-1]))
        buckets += [Bucket("prefill", FULL, *shape, pages, precision) for shape in shapes]
        buckets.append(Bucket("decode", FULL, min(limits.decode_rows), 1, pages, precision, steps=limits.decode_steps))
    order = ("prefill", "decode", FULL, RECOMPUTE, SPARSE)
    buckets.sort(key=lambda b: (b.precision != usual, order.index(b.phase), order.index(b.schedule), b.rows * b.tokens,
                                b.rows))
    table = _unique(buckets)
    if len(table) > MAX_BUCKETS:
        raise UserError(f"these limits need {len(table)} executables, over {MAX_BUCKETS}: give fewer shapes")
    return table


def pick_prefill(candidates: tuple[Bucket, ...], remaining_lengths: list[int],
                 overhead_tokens: int = STEP_OVERHEAD_TOKENS) -> Bucket:
    """The bucket that prefills the most useful tokens for its cost, the first rows of the line going first.

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


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _up_to(rows: tuple[int, ...], most: int) -> tuple[int, ...]:
    return *(one for one in rows if one < most), most


def _unique(items) -> tuple:
    return tuple(dict.fromkeys(items))
