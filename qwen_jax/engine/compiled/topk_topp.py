"""One draw per row from [R, V] scores: temperature, top-k, top-p, min-p, inverse CDF. The vocabulary is never sorted.

Each truncation keeps the tokens whose weight is at or above a threshold, so tokens that tie with the last kept one (in
float32) are kept too. A threshold is looked up among the 64 highest weights when it lies there, as it nearly always
does; otherwise it is found by bisection. It depends on its own row alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CANDIDATES = 64
BLOCK = 128


def draw(scores, top, rows, active) -> jax.Array:
    """Tokens i32[R] drawn after temperature and truncation.

    Args:
      scores: f32[R, V] logits after penalties and bias; -inf is never drawn while anything else is there.
      top: f32[R], the highest score of each row.
      rows: ``sampler.SamplingRows``.
      active: bool[R]; other rows (greedy ones) get any token.
    """
    temperature = jnp.where(active, rows.temperature, 1)[:, None]
    weights = jnp.exp((scores - top[:, None]) / temperature)  # probabilities up to a factor; the most likely has 1
    truncated = active & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    weights = lax.cond(jnp.any(truncated), lambda: _truncated(weights, rows, truncated), lambda: weights)
    return inverse_cdf(weights, uniforms(rows.seed, rows.step))


def uniforms(seed, step) -> jax.Array:
    """f32[R] in [0, 1): row r's number depends on (seed[r], step[r]) and nothing else."""

    def one(seed, step):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step))

    return jax.vmap(one)(seed, step)


def _truncated(weights, rows, active):
    """Weights f32[R, V] with 0 for tokens outside top-k, top-p or min-p. Rows that are not active keep theirs."""
    vocab = weights.shape[1]
    listed, _ = top_k(weights, min(CANDIDATES, vocab))
    size = listed.shape[1]

    k = jnp.where(active & (rows.top_k > 0), jnp.minimum(rows.top_k, vocab), vocab)
    kth = _bisected(
        lambda t: jnp.sum(weights >= t, axis=1, dtype=jnp.int32), target=k, total=jnp.full_like(k, vocab),
        high=listed[:, -1], at_most_one=lambda gap, _: gap <= 1, wanted=(k > size) & (k < vocab),
    )  # fmt: skip
    kth = jnp.where(k <= size, _at(listed, jnp.minimum(k, size) - 1), kth)
    kth = jnp.where(k < vocab, kth, 0)
    weights = jnp.where(weights >= kth[:, None], weights, 0)

    total = jnp.sum(weights, axis=1)
    target = rows.top_p * total
    reached = jnp.cumsum(listed, axis=1) >= target[:, None]
    in_list = jnp.any(reached, axis=1)
    nucleus = active & (rows.top_p < 1)
    floor = _bisected(
        lambda t: jnp.sum(jnp.where(weights >= t, weights, 0), axis=1), target=target, total=total,
        high=listed[:, -1], at_most_one=lambda gap, low: gap < 2 * low, wanted=nucleus & ~in_list,
    )  # fmt: skip
    floor = jnp.where(in_list, _at(listed, jnp.argmax(reached, axis=1)), floor)
    floor = jnp.maximum(jnp.where(nucleus, floor, 0), jnp.where(active, rows.min_p, 0))
    floor = jnp.minimum(floor, listed[:, 0])  # the most likely token stays, whatever rounding made of its weight
    return jnp.where(weights >= floor[:, None], weights, 0)


def _bisected(measure, target, total, high, at_most_one, wanted):
    """Largest t f32[R] in [0, high] with measure(t) >= target: bisection over bit patterns, at most 31 passes over V.

    The bits of floats that are not negative are integers in the same order: exact, and quick to reach a tiny t.

    Args:
      measure: t f32[R, 1] -> [R], how much lies at or above t.
      total: [R], measure(0); not below the target.
      at_most_one: (measure(low) - measure(high), low f32[R]) -> bool[R]: no two elements are left in [low, high), so
        the set of elements at or above low is decided. For a float32 sum: or none that the sum can resolve.
      wanted: bool[R]; other rows cost no pass and get 0.
    """

    def as_float(bits):
        return lax.bitcast_convert_type(bits, jnp.float32)

    def unfinished(low, high, below, above):
        return wanted & (high - low > 1) & ~at_most_one(below - above, as_float(low))

    def halve(state):
        low, high, below, above = state
        middle = low + (high - low) // 2
        amount = measure(as_float(middle)[:, None])
        rise = unfinished(*state) & (amount >= target)
        fall = unfinished(*state) & (amount < target)
        return (
            jnp.where(rise, middle, low), jnp.where(fall, middle, high),
            jnp.where(rise, amount, below), jnp.where(fall, amount, above),
        )  # fmt: skip

    high = lax.bitcast_convert_type(high, jnp.int32) + 1
    state = (jnp.zeros_like(high), high, total, jnp.zeros_like(total))
    return as_float(lax.while_loop(lambda state: jnp.any(unfinished(*state)), halve, state)[0])


def _blocks(x, fill):
    """[R, V] -> [R, ceil(V / BLOCK), BLOCK]; two short reductions are faster than one long one, and parallel."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=fill).reshape(len(x), -1, BLOCK)


def top_k(x, k):
    """Highest k of each row, highest first: (values, ids)."""
    # Without the barriers XLA merges a slice of the result into its expansion of top-k, a sort of the whole row, and no
    # longer recognises it: 300 ms instead of 2 for [8, 151936] on a CPU. One barrier for both results crashes XLA's
    # compiler where there are several devices.
    values, ids = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def _at(x, index):
    """x[r, index[r]] for each row r."""
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def max_and_argmax(x):
    """Largest value [R] of x[R, V] and the first index i32[R] that has it."""
    blocks = _blocks(x, -jnp.inf)
    highest = jnp.max(blocks, axis=2)
    block = jnp.argmax(highest, axis=1)
    inside = jnp.argmax(_at(blocks, block), axis=1)
    return _at(highest, block), (block * BLOCK + inside).astype(jnp.int32)


def inverse_cdf(weights, u):
    """First id whose cumulative weight exceeds u times the total: weights f32[R, V], u f32[R] in [0, 1] -> i32[R].

    Sums blocks, and blocks of blocks; then picks one and descends into it. An id of weight 0 is never returned while
    another one is positive: where rounding leaves nothing above the target, it is the last positive id.
    """
    levels = [weights[:, None]]
    while levels[-1].shape[1] * levels[-1].shape[2] > BLOCK:
        levels[-1] = _blocks(levels[-1].reshape(len(weights), -1), 0)
        levels.append(jnp.sum(levels[-1], axis=2)[:, None])
    index = jnp.zeros(len(weights), jnp.int32)
    target = u * jnp.sum(levels[-1], axis=(1, 2))
    for level in reversed(levels):
        inside = _at(level, index)
        cumulative = running_sum(inside)
        chosen = _first_above(cumulative, inside, target)
        target -= _at(cumulative - inside, chosen)
        index = index * level.shape[2] + chosen
    return index


def running_sum(x):
    """Cumulative sums of x[R, n] for a small n, as one product: XLA:CPU compiles ``cumsum`` to hundreds of operations,
    which took a third of a program's compile time."""
    upper = np.triu(np.ones((x.shape[1],) * 2, np.float32))
    return jnp.dot(x, upper, precision=lax.Precision.HIGHEST)


def _first_above(cumulative, weights, target):
    """First index with a positive weight whose cumulative weight exceeds target[R], else the last positive one."""
    positive = weights > 0
    above = positive & (cumulative > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    return jnp.where(jnp.any(above, axis=1), jnp.argmax(above, axis=1), last).astype(jnp.int32)
