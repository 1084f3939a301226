"""Losses of next-token prediction and distillation, for a vocabulary too large for all logits to exist at once."""
from functools import partial

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 1 << 24  # elements: 64 MiB in float32


def _chunked(length: int, rows: int, vocab: int):
    """Return a function that cuts ``[B, T, ...]`` along T into ``[chunks, B, c, ...]``, padded with zeros at the end.

    The chunks are so short that the logits of one fit into `LOGITS_AT_ONCE`.
    """
    chunk = min(length, max(-(-64 // rows), LOGITS_AT_ONCE // (rows * vocab)))

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return cut


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array,
                  train_head: bool = True) -> tuple[jax.Array, jax.Array]:
    """Return the weighted cross-entropy summed over all tokens, in nats, and the weights of tokens predicted right.

    The sums are those of ``weight · -log p(target)`` and of ``weight``, two float32 scalars. A token is predicted right
    when no other token has a higher probability. hidden ``[B, T, D]``, head ``[V, D]``, targets (int32) and weights
    (float32) ``[B, T]``.

    Only one chunk of each row's tokens has logits at a time. Gradients are computed with the loss, chunk by chunk, so
    no logits are computed twice. The head has a gradient only with `train_head` (else it is zero), targets and weights
    have none.
    """
    cut = _chunked(hidden.shape[1], hidden.shape[0], len(head))
    return _summed(train_head, cut(hidden), head, cut(targets), cut(weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(train_head, hidden, head, targets, weights):
    def body(sums, item):
        nll, right, _ = _chunk(head, *item)
        return (sums[0] + nll, sums[1] + right), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))[0]


def _chunk(head, hidden, targets, weights):
    """Return `cross_entropy`'s two sums for a chunk, and the gradient ``[B, c, V]`` of its loss by its logits.

    Reductions over the vocabulary are sums and maxima, which also run when the head and its logits are split.
    """
    logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    onehot = jnp.arange(len(head)) == targets[..., None]
    chosen = jnp.where(onehot, logits, 0).sum(axis=-1)
    nll = ((jnp.log(total) + top)[..., 0] - chosen) * weights
    right = (chosen >= top[..., 0]) * weights
    return nll.sum(), right.sum(), (exponentials / total - onehot) * weights[..., None]


def _forward(train_head, hidden, head, targets, weights):
    def body(carry, item):
        nll, right, head_gradient = carry
        more, more_right, logits_gradient = _chunk(head, *item)
        logits_gradient = logits_gradient.astype(head.dtype)
        hidden_gradient = jnp.einsum("bcv,vd->bcd", logits_gradient, head, preferred_element_type=jnp.float32)
        if train_head:
            head_gradient += jnp.einsum("bcv,bcd->vd", logits_gradient, item[0], preferred_element_type=jnp.float32)
        return (nll + more, right + more_right, head_gradient), hidden_gradient.astype(hidden.dtype)

    head_gradient = jnp.zeros(head.shape if train_head else (), jnp.float32)
    (nll, right, head_gradient), hidden_gradient = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0), head_gradient),
                                                    (hidden, targets, weights))
    return (nll, right), (hidden_gradient, head_gradient, head)


def _backward(train_head, residuals, cotangents):
    hidden_gradient, head_gradient, head = residuals
    scale, _ = cotangents  # the count of right predictions has no gradient
    head_gradient = (head_gradient * scale).astype(head.dtype) if train_head else jnp.zeros_like(head)
    return (hidden_gradient * scale).astype(hidden_gradient.dtype), head_gradient, None, None


_summed.defvjp(_forward, _backward)


def distillation(hidden: jax.Array, head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
                 targets: jax.Array, weights: jax.Array, temperature: float, kl_weight: float
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the distillation loss (`recipe.Distill`), tokens predicted right and KL divergence, as weighted sums.

    hidden ``[B, T, D]``, head ``[V, D]`` of the student and of the teacher (their D may differ); targets and weights
    ``[B, T]``. Returns three float32 scalars; loss and divergence are in nats. Works chunk by chunk; the backward pass
    computes the logits again.
    """
    cut = _chunked(hidden.shape[1], hidden.shape[0], len(head))
    wide = head.astype(jnp.float32)  # gradients of all chunks are added in float32

    @jax.checkpoint
    def body(sums, item):
        hidden, teacher_hidden, targets, weights = item
        student = jnp.einsum("bcd,vd->bcv", hidden, wide.astype(head.dtype), preferred_element_type=jnp.float32)
        teacher = jnp.einsum("bcd,vd->bcv", teacher_hidden, teacher_head, preferred_element_type=jnp.float32)
        onehot = jnp.arange(len(head)) == targets[..., None]
        chosen = jnp.where(onehot, student, 0).sum(axis=-1)
        nll = jax.nn.logsumexp(student, axis=-1) - chosen
        log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
        kl = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)
        loss = (1 - kl_weight) * nll + kl_weight * temperature ** 2 * kl
        new = (loss * weights).sum(), ((chosen >= student.max(axis=-1)) * weights).sum(), (kl * weights).sum()
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.float32(0)
    return jax.lax.scan(body, (zero, zero, zero), tuple(map(cut, (hidden, teacher_hidden, targets, weights))))[0]
