"""Next-token loss, over a vocabulary too large for its logits to exist all at once."""
from functools import partial

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MiB in float32


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array,
                  train_head: bool = True) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens of ``weight · -log p(target)``, in nats, and of the weights of tokens predicted right.

    hidden ``[..., D]``, head ``[V, D]``, targets (int32) and weights (float32) ``[...]``. Returns two float32 scalars.
    Never more than a chunk of tokens has logits. Gradients are made with the loss, chunk by chunk, so no logits are
    computed twice; that of the head only with `train_head` (else it is zero). Targets and weights have none.
    """
    count, dim = targets.size, hidden.shape[-1]
    chunk = min(count, max(64, LOGITS_AT_ONCE // len(head)))
    padding = -count % chunk
    hidden = jnp.pad(hidden.reshape(count, dim), ((0, padding), (0, 0))).reshape(-1, chunk, dim)
    targets, weights = (jnp.pad(x.reshape(count), (0, padding)).reshape(-1, chunk) for x in (targets, weights))
    return _summed(train_head, hidden, head, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(train_head, hidden, head, targets, weights):
    def body(sums, item):
        nll, right, _ = _chunk(head, *item)
        return (sums[0] + nll, sums[1] + right), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))[0]


def _chunk(head, hidden, targets, weights):
    """Sums of one chunk, and the gradient ``[c, V]`` of its loss with respect to its logits: p - onehot, weighted."""
    logits = jnp.einsum("cd,vd->cv", hidden, head, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    nll = ((jnp.log(total) + top - chosen)[:, 0] * weights).sum()
    right = ((jnp.argmax(logits, axis=-1) == targets) * weights).sum()
    onehot = jnp.arange(len(head)) == targets[:, None]
    return nll, right, (exponentials / total - onehot) * weights[:, None]


def _forward(train_head, hidden, head, targets, weights):
    def body(carry, item):
        nll, right, of_head = carry
        more, more_right, of_logits = _chunk(head, *item)
        of_logits = of_logits.astype(head.dtype)
        of_hidden = jnp.einsum("cv,vd->cd", of_logits, head, preferred_element_type=jnp.float32)
        if train_head:
            of_head += jnp.einsum("cv,cd->vd", of_logits, item[0], preferred_element_type=jnp.float32)
        return (nll + more, right + more_right, of_head), of_hidden

    of_head = jnp.zeros(head.shape if train_head else (), jnp.float32)
    (nll, right, of_head), of_hidden = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0), of_head),
                                                    (hidden, targets, weights))
    return (nll, right), (of_hidden.astype(hidden.dtype), of_head, head)


def _backward(train_head, residuals, cotangents):
    of_hidden, of_head, head = residuals
    scale, _ = cotangents  # counting what is right has no gradient
    of_head = (of_head * scale).astype(head.dtype) if train_head else jnp.zeros_like(head)
    return (of_hidden * scale).astype(of_hidden.dtype), of_head, None, None


_summed.defvjp(_forward, _backward)
