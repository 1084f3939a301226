"""Random draws of tokens from [R, V] scores: temperature, top-k, top-p, min-p, inverse CDF, without sorting V.

Each truncation keeps the tokens whose weight is at or above a threshold, so tokens that tie with the last kept token
(in float32) are kept too. A threshold is looked up among the 64 highest weights when it lies there, as it nearly always
does; otherwise it is found by bisection. It depends on its own row alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CANDIDATES = 64  # highest weights of a row that are listed
BLOCK = 128  # elements that one reduction sums up


def draw(scores, top, rows, active) -> jax.Array:
    """Draw a token i32 for each row from its scores, after temperature, top-k, top-p and min-p.

    Args:
      scores: f32[R, V] logits after penalties and bias; -inf is never drawn while another score is finite.
      top: f32[R], the highest score of each row.
      rows: ``sampler.SamplingRows``.
      active: bool[R]; other rows (greedy rows) get any token.
    """
    temperature = jnp.where(active, rows.temperature, 1)[:, None]
    weights = jnp.exp((scores - top[:, None]) / temperature)  # probabilities up to a factor; the most likely has 1
    truncated = active & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    weights = lax.cond(jnp.any(truncated), lambda: _truncated(weights, rows, truncated), lambda: weights)
    return inverse_cdf(weights, uniforms(rows.seed, rows.step))


def uniforms(seed, step) -> jax.Array:
    """Return a random number in [0, 1) for each row, f32[R], which depends on its seed and its step alone."""

    def uniform(seed, step):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step))

    return jax.vmap(uniform)(seed, step)


def _truncated(weights, rows, active):
    """Set weights f32[R, V] to 0 for tokens outside top-k, top-p or min-p. Rows that are not active keep theirs."""
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
    floor = jnp.minimum(floor, listed[:, 0])  # the most likely token stays, however its weight was rounded
    return jnp.where(weights >= floor[:, None], weights, 0)


def _bisected(measure, target, total, high, at_most_one, wanted):
    """Find for each row the largest threshold t in [0, high] with measure(t) >= target, in at most 31 passes over V.

    Bisects the bit patterns: those of floats that are not negative are integers in the same order. So the result is
    exact, and a tiny t is reached quickly.

    Args:
      measure: function of t f32[R, 1] that returns [R], how much lies at or above t.
      total: [R], measure(0); not below the target.
      at_most_one: function of (measure(low) - measure(high), low f32[R]) that returns bool[R], whether at most one
        element is left in [low, high), so that the set of elements at or above low is decided. For a float32 sum also
        true where the sum cannot resolve the elements left.
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
    """Reshape [R, V] to [R, ceil(V / BLOCK), BLOCK]: two short reductions are faster than a long one, and parallel."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=fill).reshape(len(x), -1, BLOCK)


def top_k(x, k):
    """Return the k highest values of each row, highest first, and their ids."""
    # Without the barriers XLA merges a slice of the result into its expansion of top-k, a sort of the whole row, and no
    # longer recognises it: 300 ms instead of 2 for [8, 151936] on a CPU. One barrier for both results crashes XLA's
    # compiler where there are several devices.
    values, ids = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def _at(x, index):
    """Return x[r, index[r]] for each row r."""
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def max_and_argmax(x):
    """Return the largest value [R] of each row of x[R, V], and the first index i32[R] that has it."""
    blocks = _blocks(x, -jnp.inf)
    highest = jnp.max(blocks, axis=2)
    block = jnp.argmax(highest, axis=1)
    inside = jnp.argmax(_at(blocks, block), axis=1)
    return _at(highest, block), (block * BLOCK + inside).astype(jnp.int32)


def inverse_cdf(weights, u):
    """Return the first id i32[R] whose cumulative weight exceeds u times the total: weights f32[R, V], u f32[R].

    Sums blocks, and blocks of blocks; then picks a block and descends into it. An id of weight 0 is never returned
    while another weight is positive: where rounding leaves nothing above the target, it is the last positive id.
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
    """Return the cumulative sums of each row of x[R, n] for a small n, computed as one matrix product.

    XLA:CPU compiles ``cumsum`` to hundreds of operations, which took a third of a program's compile time.
    """
    upper = np.triu(np.ones((x.shape[1],) * 2, np.float32))
    return jnp.dot(x, upper, precision=lax.Precision.HIGHEST)


def _first_above(cumulative, weights, target):
    """Return each row's first index with a positive weight whose cumulative weight exceeds target[R], or else its last
    index with a positive weight.
    """
    positive = weights > 0
    above = positive & (cumulative > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    return jnp.where(jnp.any(above, axis=1), jnp.argmax(above, axis=1), last).astype(jnp.int32)
