"""Next-token loss, over a vocabulary too large for its logits to exist all at once."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MiB in float32


def cross_entropy(logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array,
                  weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens of ``weight · -log p(target)``, in nats, and of the weights of tokens predicted right.

    logits_of: float32 logits ``[n, V]`` of ``hidden[n, D]``; called on a chunk of tokens at a time, and again in the
    backward pass, so that never more than a chunk's logits exist. hidden ``[..., D]``, targets (int32) and weights
    (float32) of its leading axes. Returns two float32 scalars.
    """
    dim = hidden.shape[-1]
    vocabulary = jax.eval_shape(logits_of, jax.ShapeDtypeStruct((2, dim), hidden.dtype)).shape[-1]
    count = targets.size
    chunk = min(count, max(64, LOGITS_AT_ONCE // vocabulary))
    padding = -count % chunk
    items = (jnp.pad(hidden.reshape(count, dim), ((0, padding), (0, 0))).reshape(-1, chunk, dim),
             jnp.pad(targets.reshape(count), (0, padding)).reshape(-1, chunk),
             jnp.pad(weights.reshape(count), (0, padding)).reshape(-1, chunk))

    def body(sums, item):
        hidden, targets, weights = item
        logits = logits_of(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        right = jnp.argmax(logits, axis=-1) == targets
        return (sums[0] + (nll * weights).sum(), sums[1] + (right * weights).sum()), None

    zero = jnp.zeros((), jnp.float32)
    if len(items[0]) == 1:
        return body((zero, zero), jax.tree.map(lambda x: x[0], items))[0]
    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), (zero, zero), items)[0]
